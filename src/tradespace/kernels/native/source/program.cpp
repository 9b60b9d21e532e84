// A model's step as a list of operations over fixed buffers, recorded once and run by all threads together: no call comes back to Python between layers.
#include <algorithm>
#include <chrono>

#include "attention.h"
#include "decode.h"
#include "elementwise.h"
#include "matmul.h"

namespace ts {

enum OpKind : int32_t { OP_EMBED = 0, OP_NORM = 1, OP_PRODUCT = 2, OP_HEADS = 3, OP_ATTEND = 4, OP_PREPARE = 5, OP_ACTIVATE = 6, OP_FINISH_LOGITS = 7 };

// What each kind reads is said at its function. Mirrored field by field in program.py.
struct Op {
  int32_t kind, wait, form, choice, flags, heads, kv_heads, head_width;
  int32_t value_width, dims, chunked, operand_rows;
  float eps, scale, softcap, unused;
  float *in, *out;
  const float *weight, *bias, *second, *table;
  int64_t in_stride, out_stride, width, window;
  Matrix matrix, positions;
  Operand operand;
  Cache cache;
  float* partials;
  int64_t slots;
};

enum Flag : int32_t { FLAG_ROWS = 1, FLAG_ADD = 2, FLAG_INTERLEAVED = 4, FLAG_GATED = 8, FLAG_ACCUMULATE = 32, FLAG_NORM_FULL = 64 };

TS_INLINE void share(const Worker& worker, int64_t total, int64_t* first, int64_t* last) {
  *first = total * worker.index / worker.count;
  *last = total * (worker.index + 1) / worker.count;
}

// out[t] = scale · row of the token (+ row of its position); `dims` is the offset of positions
static void embed(const Op& op, const Step& step, int64_t first, int64_t last) {
  for (int64_t t = first; t < last; t++) {
    float* out = op.out + t * op.out_stride;
    decode_row(op.matrix, step.tokens[t], out);
    for (int64_t c = 0; c < op.width; c++) out[c] *= op.scale;
    for (int64_t c = op.width; c < op.out_stride; c++) out[c] = 0.f;
    if (op.flags & FLAG_NORM_FULL) norm_row(out, out, op.width, op.choice, op.weight, op.bias, op.eps);
    if (op.positions.data)
      for (int64_t c = 0; c < op.width; c++) out[c] += ((const float*)op.positions.data)[(step.positions[t] + op.dims) * op.width + c];
  }
}

// norm of `in` (of the rows that logits are wanted of, with FLAG_ROWS): into the operand, or with FLAG_ADD scaled and added to `out`
static void norm(const Op& op, const Step& step, int64_t first, int64_t last, float* scratch) {
  for (int64_t t = first; t < last; t++) {
    const float* in = op.in + (op.flags & FLAG_ROWS ? step.rows[t] : t) * op.in_stride;
    norm_row(in, scratch, op.width, op.choice, op.weight, op.bias, op.eps);
    if (op.flags & FLAG_ADD) {
      float* out = op.out + t * op.out_stride;
      for (int64_t c = 0; c < op.width; c += LANES) store(out + c, fma(load(scratch + c), splat(op.scale), load(out + c)));
      continue;
    }
    for (int64_t c = round_up(op.width, LANES); c < round_up(op.width, SECTION); c++) scratch[c] = 0.f;
    put_row(op.operand, t, scratch, op.width, op.form);
  }
}

// y (T, R) (+)= scale · (operand @ W.T + bias); `dims` is the first column of y, for one of several matrices side by side; the operand begins at row `base`
static Product product_of(const Op& op, int64_t tokens, int64_t base = 0) {
  Product p;
  p.weight = op.matrix;
  p.x = from_row(op.operand, base);
  p.tokens = tokens;
  p.form = op.form;
  p.y = op.out + op.dims;
  p.y_stride = op.out_stride;
  p.bias = op.bias;
  p.accumulate = (op.flags & FLAG_ACCUMULATE) != 0;
  p.scale = op.scale;
  return p;
}

// whether an attention and its heads multiply pairs of bf16
static bool in_pairs(const Op& op) { return op.form == FORM_BF16 && pairs_of(op.cache); }

// q, k and v of tokens side by side in `in`: norm of heads, rotation, keys and values into the cache, queries scaled, and rounded to bf16 where attention is to
// read that, where they are. A unit is a token's head.
static void heads(const Op& op, const Step& step, int64_t first, int64_t last, float* scratch) {
  const int64_t all = op.heads + 2 * op.kv_heads, H = op.head_width;
  const bool full = op.flags & FLAG_NORM_FULL, pairs = in_pairs(op);
  if (full) {  // the norm is as wide as the whole projection: units are whole tokens'
    for (int64_t t = first / all; t < last / all; t++) {
      float* q = op.in + t * op.in_stride;
      norm_row(q, scratch, op.heads * H, NORM_RMS, op.weight, nullptr, op.eps);
      std::memcpy(q, scratch, (size_t)(op.heads * H) * 4);
      norm_row(q + op.heads * H, scratch, op.kv_heads * H, NORM_RMS, op.second, nullptr, op.eps);
      std::memcpy(q + op.heads * H, scratch, (size_t)(op.kv_heads * H) * 4);
    }
  }
  // where keys will be written is asked for first: a token's key lies in as many lines as it has numbers, or in half or a quarter as many
  for (int64_t unit = first, s = 0; unit < last && last - first < 64 * all; unit++) {
    const int64_t t = unit / all, head = unit % all - op.heads;
    while (t >= step.starts[s + 1]) s++;
    if (head >= 0 && head < op.kv_heads) expect_key(op.cache, step, s, step.positions[t], (int)head);
  }
  for (int64_t t = first / all, s = 0; t * all < last; t++) {
    while (t >= step.starts[s + 1]) s++;
    const int64_t position = step.positions[t];
    float* row = op.in + t * op.in_stride;
    for (int64_t n = std::max<int64_t>(0, first - t * all); n < std::min(all, last - t * all); n++) {
      if (n >= op.heads + op.kv_heads) {
        const int head = (int)(n - op.heads - op.kv_heads);
        write_value(op.cache, step, s, position, head, row + (op.heads + op.kv_heads) * H + head * (int64_t)op.value_width);
        continue;
      }
      float* head = row + n * H;
      if (op.weight && !full) {
        norm_row(head, scratch, H, NORM_RMS, n < op.heads ? op.weight : op.second, nullptr, op.eps);
        std::memcpy(head, scratch, (size_t)H * 4);
      }
      if (op.table) rotate(head, op.table + position * op.dims, op.dims, (op.flags & FLAG_INTERLEAVED) != 0);
      if (n >= op.heads) write_key(op.cache, step, s, position, (int)(n - op.heads), head);
      else if (pairs) round_query(head, H, op.scale);
      else
        for (int64_t c = 0; c < H; c++) head[c] *= op.scale;
    }
  }
}

static Attention attention_of(const Op& op) {
  Attention a;
  a.cache = op.cache;
  a.q = op.in;
  a.q_stride = op.in_stride;
  a.pairs = in_pairs(op);
  a.out = op.out;
  a.out_stride = op.out_stride;
  a.sinks = op.weight;
  a.query_heads = op.heads;
  a.window = op.window;
  a.chunked = op.chunked;
  a.softcap = op.softcap;
  a.partials = op.partials;
  a.slots = op.slots;
  return a;
}

static int64_t sections_of(const Op& op) { return (op.width + SECTION - 1) / SECTION; }

// activation of `in`, times the half beside it where gated → operand; without one (ACT_IDENTITY) it only changes the form. A unit is a token's section.
static void prepare(const Op& op, int64_t first, int64_t last, int64_t base = 0) {
  constexpr int64_t RUN = 4;  // sections of a row whose form is changed at once
  const Operand operand = from_row(op.operand, base);
  const int64_t sections = sections_of(op), whole = op.width / SECTION;
  for (int64_t unit = first; unit < last;) {
    const int64_t t = unit / sections, s = unit % sections, column = s * SECTION;
    const int64_t run = std::clamp<int64_t>(std::min(whole - s, last - unit), 1, RUN);
    unit += run;
    const float* in = op.in + t * op.in_stride + column;
    const float* up = op.flags & FLAG_GATED ? in + op.width : nullptr;
    alignas(64) float x[RUN * SECTION], rest[2 * SECTION];
    const int64_t count = std::min<int64_t>(run * SECTION, op.width - column);
    if (count < SECTION) {  // a row's last section, filled up with zeros
      std::memset(rest, 0, sizeof rest);
      std::memcpy(rest, in, (size_t)count * 4);
      if (up) std::memcpy(rest + SECTION, up, (size_t)count * 4);
      in = rest;
      if (up) up = rest + SECTION;
    }
    if (op.choice != ACT_IDENTITY) {
      for (int64_t c = 0; c < run * SECTION; c += LANES) {
        vf y = activate(load(in + c), op.choice);
        if (up) y = y * load(up + c);
        store(x + c, y);
      }
      for (int64_t c = count; c < SECTION; c++) x[c] = 0.f;
      in = x;
    }
    put_row(operand, t, in, run * SECTION, op.form, s);
  }
}

constexpr int64_t FEW_TOKENS = 2;  // below, activating is nothing beside reading the weights, which are best read in order

// Whether `product` makes gate and up of `after`, whole sections of both: then the thread that has made a section of each activates it at once.
static bool feeds(const Op& product, const Op& after) {
  return product.kind == OP_PRODUCT && after.kind == OP_ACTIVATE && (after.flags & FLAG_GATED) && after.in == product.out && product.dims == 0 &&
         after.width % SECTION == 0 && product.matrix.rows == 2 * after.width && !(product.flags & (FLAG_ROWS | FLAG_ACCUMULATE));
}

// The wide product from the operand's row `base` on, and its activation into the rows from `out` on.
static void multiply_activated(Worker& worker, const Op& product, const Op& after, int64_t tokens, int64_t base, int64_t out) {
  const Product p = product_of(product, tokens, base);
  const int64_t sections = sections_of(after), each = SECTION / LANES, up = after.width / LANES, piece = std::max<int64_t>(1, sections / (8 * worker.count));
  int64_t first, last;
  while (worker.take(sections, piece, &first, &last)) {
    multiply_panels(p, each * first, each * last);
    multiply_panels(p, up + each * first, up + each * last);
    for (int64_t t = 0; t < tokens; t++) prepare(after, t * sections + first, t * sections + last, out);
  }
}

static void finish_logits(Worker& worker, const Op& op, const Step& step) {
  int64_t first, last;
  const int64_t vectors = (op.width + LANES - 1) / LANES;
  share(worker, step.num_rows * vectors, &first, &last);
  for (int64_t unit = first; unit < last; unit++) {
    float* x = op.out + unit / vectors * op.out_stride + unit % vectors * LANES;
    vf v = load(x) * op.scale;
    if (op.softcap > 0.f) v = op.softcap * tanh(v / op.softcap);
    store(x, v);
  }
}

struct Run {
  const Op* ops;
  int64_t count;
  const Step* step;
  float* scratch;  // a row of the widest norm per thread
  int64_t scratch_stride;
  int64_t* nanoseconds;  // per operation, waiting for the others included: for profiles; else null
};

static int64_t now_ns() { return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Operations that read and write rows of their own tokens alone.
static bool by_token(const Op& op) { return op.kind != OP_ATTEND && op.kind != OP_FINISH_LOGITS && !(op.flags & FLAG_ROWS); }

static void run_tokens(const Op& op, const Step& step, int64_t first, int64_t last, float* scratch) {
  const int64_t all = op.heads + 2 * op.kv_heads;
  switch (op.kind) {
    case OP_EMBED: return embed(op, step, first, last);
    case OP_NORM: return norm(op, step, first, last, scratch);
    case OP_PRODUCT: return multiply_tokens(product_of(op, step.num_tokens), first, last);
    case OP_HEADS: return heads(op, step, first * all, last * all, scratch);
    case OP_PREPARE:
    case OP_ACTIVATE: return prepare(op, first * sections_of(op), last * sections_of(op));
  }
}

// One operation, shared out in the way that suits few tokens: rows, panels of weights, heads, sections.
static void run_one(Worker& worker, const Op& op, const Step& step, float* scratch, int64_t base) {
  const int64_t rows = op.flags & FLAG_ROWS ? step.num_rows : step.num_tokens, all = op.heads + 2 * op.kv_heads;
  int64_t first, last;
  switch (op.kind) {
    case OP_EMBED: share(worker, rows, &first, &last); return embed(op, step, first, last);
    case OP_NORM: share(worker, rows, &first, &last); return norm(op, step, first, last, scratch);
    case OP_PRODUCT: return multiply(worker, product_of(op, rows, base));
    case OP_HEADS:
      if (op.flags & FLAG_NORM_FULL) {
        share(worker, rows, &first, &last);
        return heads(op, step, first * all, last * all, scratch);
      }
      share(worker, rows * all, &first, &last);
      return heads(op, step, first, last, scratch);
    case OP_ATTEND: return attend(worker, attention_of(op), step);
    case OP_PREPARE:
    case OP_ACTIVATE: share(worker, rows * sections_of(op), &first, &last); return prepare(op, first, last);
    case OP_FINISH_LOGITS: return finish_logits(worker, op, step);
  }
}

// Before it waits for the others, a thread asks for what it reads first in the operation that they all wait for: memory works meanwhile.
static void expect(const Worker& worker, const Op& op, const Step& step, int64_t base) {
  if (op.kind == OP_PRODUCT) expect_weights(worker, product_of(op, op.flags & FLAG_ROWS ? step.num_rows : step.num_tokens, base));
  if (op.kind == OP_ATTEND) expect_attention(worker, attention_of(op), step);
}

constexpr int64_t BLOCK_TOKENS = 64;  // whose rows stay in the second-level cache from one operation to the next
static_assert(BLOCK_TOKENS % ROW_BLOCK == 0, "blocks of tokens begin where blocks of rows do");

static void run(Worker& worker, void* argument) {
  const Run& run = *(const Run*)argument;
  const Step& step = *run.step;
  float* scratch = run.scratch + worker.index * run.scratch_stride;
  int64_t* const timed = worker.index == 0 ? run.nanoseconds : nullptr;
  const bool many = step.num_tokens >= MANY_TOKENS * worker.count;
  int64_t started = timed ? now_ns() : 0;
  int64_t base = 0;    // the operand's row where the next product's tokens begin
  auto lap = [&](int64_t op) {
    if (!timed) return;
    const int64_t now = now_ns();
    timed[op] += now - started;
    started = now;
  };
  for (int64_t i = 0; i < run.count;) {
    const Op& op = run.ops[i];
    if (op.wait) {
      if (step.num_tokens == 1) expect(worker, op, step, base);
      worker.barrier();
      lap(i - 1);  // waiting counts for the operation that is waited for
    }
    if (!many || !by_token(op)) {
      // its operand is read by all until the next wait: what it is activated to goes into the rows behind
      const int64_t rows = step.num_tokens;
      const int64_t behind = round_up(rows, ROW_BLOCK);
      if (rows > FEW_TOKENS && i + 1 < run.count && feeds(op, run.ops[i + 1]) && behind + rows <= op.operand_rows) {
        multiply_activated(worker, op, run.ops[i + 1], rows, base, behind);
        base = behind;
        lap(i);
        i += 2;
        continue;
      }
      if (op.kind != OP_PRODUCT) base = 0;
      run_one(worker, op, step, scratch, base);
      lap(i++);
      continue;
    }
    base = 0;
    // With many tokens each thread takes blocks of them through all operations up to the next attention, which is the first to look at other tokens.
    int64_t end = i, first, last;
    while (end < run.count && by_token(run.ops[end])) end++;
    const int64_t size = std::clamp<int64_t>(round_up(step.num_tokens / (2 * worker.count), ROW_BLOCK), 2 * ROW_BLOCK, BLOCK_TOKENS);
    while (worker.take(step.num_tokens, size, &first, &last))
      for (int64_t block = first; block < last; block += size)
        for (int64_t op = i; op < end; op++) {
          run_tokens(run.ops[op], step, block, std::min(block + size, last), scratch);
          lap(op);
        }
    i = end;
  }
}

struct Linear {
  Product product;
  const float* x;
  int64_t x_stride;
};

static void run_linear(Worker& worker, void* argument) {
  const Linear& linear = *(const Linear*)argument;
  const Product& p = linear.product;
  int64_t first, last;
  share(worker, p.tokens, &first, &last);
  for (int64_t t = first; t < last; t++) put_row(p.x, t, linear.x + t * linear.x_stride, p.weight.columns, p.form);
  worker.barrier();
  multiply(worker, p);
}

}  // namespace ts

using namespace ts;

extern "C" {

int64_t ts_op_bytes() { return (int64_t)sizeof(Op); }
int64_t ts_partial_floats(int64_t value_width) { return partial_floats(value_width); }

void ts_run(const Op* ops, int64_t count, const Step* step, float* scratch, int64_t scratch_stride, int32_t threads, int64_t* nanoseconds) {
  Run job{ops, count, step, scratch, scratch_stride, nanoseconds};
  pool_run(threads, run, &job);
}

// y (T, y_stride) = x @ W.T + bias; x padded with zeros to a multiple of 32, `operand` room for T rows in `form`
void ts_linear(const Matrix* weight, const Operand* operand, const float* x, int64_t x_stride, int64_t tokens, int32_t form, const float* bias, float* y,
               int64_t y_stride, int32_t threads) {
  Linear linear{{*weight, *operand, tokens, form, y, y_stride, bias, false, 1.f}, x, x_stride};
  pool_run(threads, run_linear, &linear);
}

}  // extern "C"
