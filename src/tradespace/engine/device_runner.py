"""A step's requests → a CUDA device and back: one transfer of what the step reads, the step itself (decodes as captured graphs), one transfer of its tokens.

`launch` returns before the device is through, so that the next step can be scheduled meanwhile; a token that is not on the host yet is taken from where the
last step left it on the device. `execute` is the same for those who want logits: it needs every token known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tradespace.engine.request import Request
from tradespace.engine.sampler import SampleRow, token_logprobs
from tradespace.engine.step import ScheduledSequence, Step
from tradespace.kernels.attention.whole_prompts import RecurringPrompts
from tradespace.kernels.sample.device import DeviceSampling, draw_rows
from tradespace.kernels.sample.triton_resolve import resolve
from tradespace.model.cuda_step import DeviceStep, Inputs, Last
from tradespace.spec.cuda import MIXED_CONTEXT, graph_rows, mixed_rows, mixed_sequences
from tradespace.spec.plan import Plan

if TYPE_CHECKING:
    from tradespace.kv.cache import KVCache

T = TypeVar("T")
UNKNOWN = -1  # stands for a token that the device has and the host has not
TURNS = 3  # host buffers of inputs, taken in turn: one is filled while the device may still read those before


class Inbox:
    """What steps of up to `tokens` tokens and `sequences` sequences read, as one piece of memory on the device and TURNS pinned copies of it on the host."""

    def __init__(self, tokens: int, sequences: int, rows: int, blocks: int, device: torch.device):
        wide = {"tokens": (tokens,), "positions": (tokens,), "slots": (tokens,), "sources": (tokens,), "rows": (rows,)}
        narrow = {"starts": (sequences + 1,), "lengths": (sequences,), "tables": (sequences, blocks)}
        self.device = device
        self._layout: dict[str, tuple[int, tuple[int, ...], Any]] = {}
        offset = 0
        for fields, size, dtype in ((wide, 8, np.int64), (narrow, 4, np.int32)):
            for name, shape in fields.items():
                self._layout[name] = (offset, shape, dtype)
                offset += prod(shape) * size
        offset = -(-offset // 8) * 8
        pinned = device.type == "cuda"
        self.buffer = torch.zeros(offset, dtype=torch.uint8, device=device)
        self._hosts = [torch.zeros(offset, dtype=torch.uint8, pin_memory=pinned) for _ in range(TURNS)]
        self._arrays = [self._views(host) for host in self._hosts]
        self.tensors = {
            name: self.buffer[at : at + prod(shape) * np.dtype(dtype).itemsize].view(torch.int64 if dtype is np.int64 else torch.int32).view(shape)
            for name, (at, shape, dtype) in self._layout.items()
        }
        self._turn = 0

    def _views(self, host: Tensor) -> dict[str, np.ndarray]:
        raw = host.numpy()
        return {name: raw[at : at + prod(shape) * np.dtype(dtype).itemsize].view(dtype).reshape(shape) for name, (at, shape, dtype) in self._layout.items()}

    @property
    def device_nbytes(self) -> int:
        return self.buffer.nbytes

    @property
    def pinned_nbytes(self) -> int:
        return sum(host.nbytes for host in self._hosts)

    def next_arrays(self) -> dict[str, np.ndarray]:
        """The host's arrays to fill for the next step."""
        self._turn = (self._turn + 1) % TURNS
        return self._arrays[self._turn]

    def clear(self) -> None:
        """A step of nobody, sent: rows that write nothing, sequences of no tokens."""
        arrays = self.next_arrays()
        for array in arrays.values():
            array.fill(0)
        arrays["slots"].fill(-1)
        arrays["sources"].fill(UNKNOWN)
        self.send()

    def send(self) -> None:
        """What was filled, to the device."""
        self.buffer.copy_(self._hosts[self._turn], non_blocking=True)

    def inputs(self, tokens: int, sequences: int, rows: int) -> Inputs:
        held = self.tensors
        return Inputs(
            held["tokens"][:tokens],
            held["positions"][:tokens],
            held["slots"][:tokens],
            held["starts"][: sequences + 1],
            held["lengths"][:sequences],
            held["tables"][:sequences],
            held["rows"][:rows],
        )


@dataclass(frozen=True, slots=True)
class Mixed:
    """A captured mixed step, and what it leaves for the head."""

    replay: Callable[[], object]
    last: Last


@dataclass(slots=True)
class InFlight:
    """A step that the device computes. `rows` says which row of its tokens belongs to which request; `tokens` waits for them."""

    step: Step
    rows: dict[str, int]
    host: Tensor
    count: int
    event: Any = None

    def tokens(self) -> list[int | None]:
        """A token for each row of logits; None where the logits hold no finite number. Waits for the device."""
        if self.event is not None:
            self.event.synchronize()
        return [None if token < 0 else token for token in self.host[: self.count].tolist()]


class DeviceRunner:
    """Runs steps of one model over one cache on a CUDA device (or, for tests, on the CPU under Triton's interpreter: without graphs)."""

    def __init__(self, model: DeviceStep, cache: KVCache, plan: Plan, *, num_tokens: int | None = None):
        self.model, self.cache, self.device = model, cache, model.device
        self.block_size, self.num_tokens = plan.kv.block_slots(plan.max_context), num_tokens or model.spec.V
        self.step_tokens, self.max_sequences = plan.step_tokens, min(plan.max_sequences, plan.step_tokens)
        blocks = -(-plan.max_context // self.block_size)
        self.decode_inbox = Inbox(self.max_sequences, self.max_sequences, self.max_sequences, blocks, self.device)
        self.inbox = Inbox(plan.step_tokens, self.max_sequences, plan.logit_rows, blocks, self.device)
        self.chosen_R = torch.zeros(plan.logit_rows, dtype=torch.int64, device=self.device)
        self._results = [torch.zeros(plan.logit_rows, dtype=torch.int64, pin_memory=self.device.type == "cuda") for _ in range(TURNS)]
        self.sampling = DeviceSampling(self.device, plan.logit_rows, model.spec.V)
        self.prompts = RecurringPrompts()
        self.graphs: dict[int, Any] = {}
        self.short_graph: Any = None  # of one sequence that has no more than `short` tokens
        self.short = 0
        self.buckets = graph_rows(self.max_sequences)
        self.mixed_graphs: dict[int, Mixed] = {}  # by tokens, ascending
        self._turn = 0

    @property
    def vocab_size(self) -> int:
        return self.model.spec.V

    @property
    def adapters(self) -> tuple[str, ...]:
        """None: the device's step multiplies packed weights alone."""
        return ()

    @property
    def nbytes(self) -> int:
        """Bytes on the device beside the model's buffers, the cache and the graphs."""
        return self.decode_inbox.device_nbytes + self.inbox.device_nbytes + self.chosen_R.nbytes + self.sampling.nbytes

    @property
    def pinned_nbytes(self) -> int:
        return self.decode_inbox.pinned_nbytes + self.inbox.pinned_nbytes + sum(result.nbytes for result in self._results)

    # ------------------------------------------------------------------------------------------------ graphs

    @torch.inference_mode()
    def capture(self, progress: Any = None) -> None:
        """Records a decode step for every number of rows in `spec.cuda.graph_rows`, the largest first, one for a sequence alone that is not long yet where that
        is computed in another way, and a mixed step for every number of tokens in `mixed_rows`: all share one pool of memory."""
        if self.device.type != "cuda":
            return
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)
        for inbox in (self.decode_inbox, self.inbox):
            inbox.clear()
        self.short = self.model.short_context
        mixed = mixed_rows(self.step_tokens)
        done, total = 0, len(self.buckets) + bool(self.short) + len(mixed)

        def captured(work: Callable[[], T]) -> tuple[Any, T]:
            nonlocal done
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                work()  # compiles what is not compiled yet, outside of the capture
            torch.cuda.current_stream(self.device).wait_stream(stream)
            torch.cuda.synchronize(self.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                left = work()
            done += 1
            if progress is not None:
                progress(done, total)
            return graph, left

        for rows in reversed(self.buckets):
            self.graphs[rows], _ = captured(partial(self._decode, rows))
        if self.short:
            self.short_graph, _ = captured(partial(self._decode, 1, self.short))
        for rows in mixed:
            graph, last = captured(partial(self._mixed, rows))
            self.mixed_graphs[rows] = Mixed(graph.replay, last)

    def _decode(self, rows: int, within: int = 0) -> None:
        """A decode step of `rows` sequences over the decode inbox, its best tokens into `chosen_R`. within: none is longer (0: than the plan says)."""
        inputs = replace(self.decode_inbox.inputs(rows, rows, rows), within=within)
        self._resolve(inputs.tokens_T, self.decode_inbox.tensors["sources"][:rows])
        logits_RV = self.model.run(inputs, decodes=True)
        self.sampling.greedy(logits_RV[:, : self.num_tokens], self.chosen_R[:rows])

    def _mixed(self, rows: int) -> Last:
        """The layers of a mixed step of `rows` tokens over the inbox, the last ones padding; who decodes is read as a prompt of one token."""
        inputs = self.inbox.inputs(rows, mixed_sequences(rows, self.max_sequences), 0)
        self._resolve(inputs.tokens_T, self.inbox.tensors["sources"][:rows])
        self.model.run(inputs, decodes=False)
        return self.model.last

    def _mixed_bucket(self, sequences: tuple[ScheduledSequence, ...], tokens: int) -> int | None:
        """Tokens of the captured mixed step that takes these; None: none does."""
        if any(item.num_tokens == 1 and item.start >= MIXED_CONTEXT for item in sequences):
            return None
        return next((rows for rows in self.mixed_graphs if rows >= tokens and mixed_sequences(rows, self.max_sequences) >= len(sequences)), None)

    def _resolve(self, tokens_T: Tensor, sources_T: Tensor) -> None:
        """Tokens that the last step left on the device, where `sources_T` names their row there."""
        resolve(tokens_T, sources_T, self.chosen_R)

    # ------------------------------------------------------------------------------------------------ a step

    def _submit(self, step: Step, known: Mapping[str, int]) -> tuple[Tensor, dict[str, int]]:
        """Sends a step and computes its logits and best tokens; nothing is waited for. Returns logits, and which row is whose first."""
        if step.copies:
            self.cache.copy_blocks(step.copies)
        sequences = step.sequences
        count = len(sequences)
        if all(item.num_tokens == 1 and item.samples for item in sequences):
            bucket = next(rows for rows in self.buckets if rows >= count) if self.graphs else count
            arrays = self.decode_inbox.next_arrays()
            self._fill_decode(arrays, sequences, known, bucket)
            self.decode_inbox.send()
            graph = self.short_graph if count == 1 and sequences[0].start < self.short else self.graphs.get(bucket)
            if graph is None:
                self._decode(bucket)
            else:
                graph.replay()
            return self.model.logits_RV[:count], {item.request.id: row for row, item in enumerate(sequences)}
        arrays = self.inbox.next_arrays()
        tokens, rows, first = self._fill_mixed(arrays, sequences, known)
        inputs, bucket = self.inbox.inputs(tokens, count, rows), self._mixed_bucket(sequences, tokens)
        if bucket is not None:
            self._pad_mixed(arrays, tokens, count, bucket)
        self.inbox.send()
        if bucket is not None:
            captured = self.mixed_graphs[bucket]
            captured.replay()
            self.model.last = captured.last
            logits_RV = self.model.logits_of(inputs.rows_R)
        else:
            singles = next((row for row, item in enumerate(sequences) if item.num_tokens > 1), count)
            rest = sequences[singles:]
            fresh = tuple(item.num_tokens for item in rest) if all(item.start == 0 for item in rest) else ()
            self._resolve(inputs.tokens_T, self.inbox.tensors["sources"][:tokens])
            logits_RV = self.model.run(replace(inputs, singles=singles, fresh=self.prompts.of(fresh)), decodes=False)
        self.sampling.greedy(logits_RV[:, : self.num_tokens], self.chosen_R[:rows])
        return logits_RV, first

    def _fill_decode(self, arrays: dict[str, np.ndarray], sequences: tuple[ScheduledSequence, ...], known: Mapping[str, int], bucket: int) -> None:
        size, tables = self.block_size, arrays["tables"]
        count = len(sequences)
        tokens, positions, slots, sources = [0] * bucket, [0] * bucket, [-1] * bucket, [UNKNOWN] * bucket
        for row, item in enumerate(sequences):
            request, position = item.request, item.start
            blocks = request.blocks
            token = request.token_ids[position]
            if token == UNKNOWN:
                sources[row] = known[request.id]
            else:
                tokens[row] = token
            positions[row] = position
            slots[row] = blocks[position // size] * size + position % size
            tables[row, : len(blocks)] = blocks
        arrays["tokens"][:bucket], arrays["positions"][:bucket], arrays["slots"][:bucket], arrays["sources"][:bucket] = tokens, positions, slots, sources
        arrays["lengths"][:count] = arrays["positions"][:count] + 1
        arrays["lengths"][count:bucket] = 0
        tables[count:bucket] = 0

    def _fill_mixed(self, arrays: dict[str, np.ndarray], sequences: tuple[ScheduledSequence, ...], known: Mapping[str, int]) -> tuple[int, int, dict[str, int]]:
        """(tokens, rows of logits, first row of each request that has one)."""
        size, at, num_rows = self.block_size, 0, 0
        first: dict[str, int] = {}
        arrays["starts"][0] = 0
        for row, item in enumerate(sequences):
            request, start, stop = item.request, item.start, item.start + item.num_tokens
            part = slice(at, at + item.num_tokens)
            tokens = np.array(item.tokens(), np.int64)
            arrays["tokens"][part] = tokens
            unknown = tokens == UNKNOWN
            arrays["sources"][part] = np.where(unknown, known[request.id], UNKNOWN) if unknown.any() else UNKNOWN
            positions = np.arange(start, stop)
            arrays["positions"][part] = positions
            blocks = np.array(request.blocks, np.int64)
            arrays["slots"][part] = blocks[positions // size] * size + positions % size
            arrays["tables"][row, : len(blocks)] = blocks
            arrays["lengths"][row], arrays["starts"][row + 1] = stop, at + item.num_tokens
            if item.num_logits:
                first[request.id] = num_rows
                arrays["rows"][num_rows : num_rows + item.num_logits] = range(part.stop - item.num_logits, part.stop)
                num_rows += item.num_logits
            at = part.stop
        return at, num_rows, first

    def _pad_mixed(self, arrays: dict[str, np.ndarray], tokens: int, count: int, rows: int) -> None:
        """Rows and sequences that a captured step has and this one has not: rows that write nothing, sequences of no tokens."""
        idle = slice(tokens, rows)
        arrays["tokens"][idle], arrays["positions"][idle], arrays["slots"][idle], arrays["sources"][idle] = 0, 0, -1, UNKNOWN
        none = slice(count, mixed_sequences(rows, self.max_sequences))
        arrays["starts"][count + 1 : none.stop + 1], arrays["lengths"][none], arrays["tables"][none] = tokens, 0, 0

    @staticmethod
    def needs_logits(request: Request) -> bool:
        """Whether a request's next token depends on what only the host has: then its steps are computed one after the other."""
        params = request.params
        return params.logprobs is not None or params.prompt_logprobs is not None or SampleRow(request).is_adjusted

    @torch.inference_mode()
    def execute(self, step: Step) -> Tensor:
        """Logits (R, V) in fp32 on the device, R = step.num_logits, valid until the next step; prompt tokens are scored for those who asked."""
        logits_RV, _ = self._submit(step, {})
        if any(item.request.params.prompt_logprobs is not None for item in step.sequences):
            logits_RV = logits_RV.clone()
            self._score_prompts(step)
        return logits_RV

    @torch.inference_mode()
    def launch(self, step: Step, last: InFlight | None = None) -> InFlight:
        """Computes a step and chooses its tokens on the device. `last`: the step before, whose tokens this one may go on from."""
        logits_RV, first = self._submit(step, {} if last is None else last.rows)
        rows = [SampleRow(item.request) for item in step.sequences if item.samples]
        if any(not row.params.greedy for row in rows):
            keys = [row.noise_key for row in rows]
            draw_rows(self.sampling, logits_RV[:, : self.num_tokens], self.chosen_R[: len(rows)], [row.params for row in rows], keys)
        self._turn = (self._turn + 1) % TURNS
        host = self._results[self._turn]
        host[: len(rows)].copy_(self.chosen_R[: len(rows)], non_blocking=True)
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        return InFlight(step, first, host, len(rows), event)

    def _score_prompts(self, step: Step) -> None:
        """Log-probabilities of the prompt tokens that a step's rows foretell, for those who asked, some rows of logits at a time."""
        start_row = 0
        for item in step.sequences:
            request, count = item.request, item.request.params.prompt_logprobs
            row, start_row = start_row, start_row + item.num_tokens
            if count is None:
                continue
            stop = min(item.start + item.num_tokens, request.num_prompt - 1)
            for start in range(item.start, stop, self.model.logit_rows):
                positions = range(start, min(stop, start + self.model.logit_rows))
                wanted = torch.tensor([row + position - item.start for position in positions], device=self.device)
                for position, logits_V in zip(positions, self.model.logits_of(wanted), strict=True):
                    request.prompt_logprobs[position + 1] = token_logprobs(logits_V, request.prompt_ids[position + 1], count)
