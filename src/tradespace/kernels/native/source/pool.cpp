#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace ts {

static inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct alignas(64) Seat {         // of one thread
  std::atomic<int64_t> units{0};  // taken of its share
  std::atomic<int> core{-1};      // where it last came to a barrier
};

struct Team {
  int count = 1;
  std::vector<Seat> seats = std::vector<Seat>(1);
  std::vector<std::thread> threads;
  std::mutex mutex;
  std::condition_variable wake;
  Job job = nullptr;
  void* argument = nullptr;
  bool stop = false;
  int pid = 0;
  alignas(64) std::atomic<uint64_t> generation{0};
  alignas(64) std::atomic<int> sleeping{0};
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<uint32_t> phase{0};

  void share_out_anew() {
    for (Seat& seat : seats) seat.units.store(0, std::memory_order_relaxed);
  }

  void serve(int index) {
    uint64_t seen = 0;
    for (;;) {
      // a decode loop comes back within some tens of microseconds: worth spinning for, and no longer
      for (int spin = 0; spin < 4000 && generation.load(std::memory_order_acquire) == seen; spin++) relax();
      if (generation.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex);
        sleeping.fetch_add(1);
        wake.wait(lock, [&] { return stop || generation.load() != seen; });
        sleeping.fetch_sub(1);
      }
      if (stop) return;
      seen = generation.load(std::memory_order_acquire);
      Worker worker{index, count, this};
      job(worker, argument);
      worker.barrier();
    }
  }

  void grow(int wanted) {
    shut();
    count = wanted;
    stop = false;
    pid = (int)getpid();
    generation.store(0);
    seats = std::vector<Seat>((size_t)count);
    for (int index = 1; index < count; index++) threads.emplace_back([this, index] { serve(index); });
  }

  void shut() {
    if (pid != 0 && pid != (int)getpid()) {  // after a fork the threads are the parent's: forget them
      for (auto& thread : threads) thread.detach();
      threads.clear();
      new (&mutex) std::mutex();
      new (&wake) std::condition_variable();
      sleeping.store(0);
    }
    if (threads.empty()) return;
    {
      std::lock_guard<std::mutex> lock(mutex);
      stop = true;
    }
    wake.notify_all();
    for (auto& thread : threads) thread.join();
    threads.clear();
  }
};

#if defined(__linux__)
static int core_now() { return sched_getcpu(); }

// The scheduler can leave two of our threads on one core for seconds while another is idle. Whoever waits there for the other moves.
static void leave_shared_core(Team& team, int index) {
  const int mine = sched_getcpu();
  bool shared = false;
  for (int other = 0; other < team.count; other++) shared |= other != index && team.seats[(size_t)other].core.load(std::memory_order_relaxed) == mine;
  cpu_set_t allowed, without;
  if (!shared || mine < 0 || sched_getaffinity(0, sizeof allowed, &allowed) || CPU_COUNT(&allowed) < team.count) return;
  without = allowed;
  CPU_CLR(mine, &without);
  for (int other = 0; other < team.count; other++) {
    const int core = team.seats[(size_t)other].core.load(std::memory_order_relaxed);
    if (other != index && core >= 0 && CPU_COUNT(&without) > 1) CPU_CLR(core, &without);
  }
  if (sched_setaffinity(0, sizeof without, &without) == 0) sched_setaffinity(0, sizeof allowed, &allowed);
}
#else
static int core_now() { return -1; }
static void leave_shared_core(Team&, int) {}
#endif

constexpr int LONG_WAIT = 2000;  // turns of a waiting loop, some tens of microseconds

void Worker::barrier() {
  if (count == 1) {
    team->share_out_anew();
    return;
  }
  team->seats[(size_t)index].core.store(core_now(), std::memory_order_relaxed);
  uint32_t phase = team->phase.load(std::memory_order_relaxed);
  if (team->arrived.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
    team->share_out_anew();
    team->arrived.store(0, std::memory_order_relaxed);
    team->phase.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spin = 1; team->phase.load(std::memory_order_acquire) == phase; spin++) {
    relax();
    if (spin == LONG_WAIT) leave_shared_core(*team, index);
    // the other thread may have lost its core: it may have ours, but not soon, since who yields a core that others want goes without it for milliseconds
    if (spin > 20 * LONG_WAIT && spin % LONG_WAIT == 0) sched_yield();
  }
}

bool Worker::take(int64_t total, int64_t size, int64_t* first, int64_t* last) {
  if (count == 1) size = total;
  for (int turn = 0; turn < count; turn++) {
    const int64_t whose = (index + turn) % count;
    const int64_t begin = total * whose / count / size * size, end = whose + 1 == count ? total : total * (whose + 1) / count / size * size;
    std::atomic<int64_t>& units = team->seats[(size_t)whose].units;
    if (units.load(std::memory_order_relaxed) >= end - begin) continue;
    const int64_t start = begin + units.fetch_add(size, std::memory_order_relaxed);
    if (start >= end) continue;
    *first = start;
    *last = start + size < end ? start + size : end;
    return true;
  }
  return false;
}

bool Worker::take_of_run(int64_t total, int64_t streams, int64_t size, int64_t* begin, int64_t* end, int64_t* first, int64_t* last) {
  for (int turn = 0; turn < count; turn++) {
    const int64_t whose = (index + turn) % count;
    *begin = total * whose / count;
    *end = total * (whose + 1) / count;
    const int64_t units = (*end - *begin + streams - 1) / streams;
    std::atomic<int64_t>& taken = team->seats[(size_t)whose].units;
    if (taken.load(std::memory_order_relaxed) >= units) continue;
    *first = taken.fetch_add(size, std::memory_order_relaxed);
    if (*first >= units) continue;
    *last = *first + size < units ? *first + size : units;
    return true;
  }
  return false;
}

// never destroyed: at exit the threads may still sleep in it
static Team& team() {
  static Team* found = new Team();
  return *found;
}

static std::mutex entrance;

void pool_run(int threads, Job job, void* argument) {
  std::lock_guard<std::mutex> lock(entrance);
  Team& shared = team();
  if (threads < 1) threads = 1;
  if (threads == 1) {
    static Team alone;
    alone.share_out_anew();
    Worker worker{0, 1, &alone};
    job(worker, argument);
    return;
  }
  if (shared.count != threads || shared.pid != (int)getpid()) shared.grow(threads);
  shared.job = job;
  shared.argument = argument;
  shared.share_out_anew();
  shared.generation.fetch_add(1);
  if (shared.sleeping.load()) {
    { std::lock_guard<std::mutex> wait_until_asleep(shared.mutex); }
    shared.wake.notify_all();
  }
  Worker worker{0, threads, &shared};
  job(worker, argument);
  worker.barrier();
}

}  // namespace ts
