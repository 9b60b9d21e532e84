// A pool of threads that run one job together, a step's whole list of operations, and meet at barriers between operations.
// Idle threads sleep in the kernel; a waiting one spins for some microseconds first, because the next step usually comes at once.
#pragma once
#include <atomic>
#include <cstdint>

namespace ts {

struct Team;

// What a job sees: which thread it is, of how many, and how to share work.
struct Worker {
  int index, count;
  Team* team;

  // Waits for all threads; whoever comes last resets what is shared out for the next operation.
  void barrier();
  // The next `size` units of `total` that nobody took yet: [first, last), empty when all are taken. Each thread has a run of neighbouring units of its own, the
  // same at every step, so that it finds in its cache what it left there and memory is read in order; one that is through helps the others.
  bool take(int64_t total, int64_t size, int64_t* first, int64_t* last);
  // The same where a thread's run [begin, end) of the total is worked at in `streams` places at once: the next units of the run, which has one for each step that
  // they all make.
  bool take_of_run(int64_t total, int64_t streams, int64_t size, int64_t* begin, int64_t* end, int64_t* first, int64_t* last);
};

typedef void (*Job)(Worker&, void*);

void pool_run(int threads, Job job, void* argument);

}  // namespace ts
