"""Who may go to the engine next: a bounded queue, by priority, then round robin over clients. No HTTP and no engine here.

The engine runs requests strictly in order of arrival, so whoever hands it 200 prompts would have it alone. Here each client (API key, or address) has a
queue of its own, and the engine gets about as many requests as it can run, one of each client in turn. A client that comes late waits for one free place, not
for all who came before.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

J = TypeVar("J")


class QueueFull(Exception):
    """No room; `retry_s`: when it may be worth another try."""

    def __init__(self, message: str, retry_s: int):
        super().__init__(message)
        self.retry_s = retry_s


class Admission(Generic[J]):
    """`places` outputs at once in the engine, at most `max_queue` requests waiting here. Jobs are hashable; each counts as many outputs as it says.

    >>> queue = Admission(places=1, max_queue=8)
    >>> for job, key in (("a1", "a"), ("a2", "a"), ("b1", "b")): queue.add(job, key=key)
    >>> order = []
    >>> while job := next(queue.take(), None):
    ...     order.append(job); queue.done(job)
    >>> order
    ['a1', 'b1', 'a2']
    """

    def __init__(self, *, places: int, max_queue: int):
        self.places, self.max_queue = places, max_queue
        self._waiting: dict[int, OrderedDict[str, deque[tuple[J, int]]]] = {}  # priority → client → jobs
        self._inside: dict[J, int] = {}
        self.num_waiting = 0
        self.num_inside = 0  # outputs

    def add(self, job: J, *, key: str, priority: int = 0, outputs: int = 1) -> None:
        """Queue a job. Raises QueueFull."""
        if self.num_waiting >= self.max_queue:
            raise QueueFull(f"{self.num_waiting} requests are waiting, as many as may (--max-queue {self.max_queue}). Try again later", self._retry_s())
        self._waiting.setdefault(priority, OrderedDict()).setdefault(key, deque()).append((job, outputs))
        self.num_waiting += 1

    def take(self) -> Iterator[J]:
        """Those who may go in now, the lowest priority number first."""
        while self.num_waiting:
            priority = min(self._waiting)
            clients = self._waiting[priority]
            key, jobs = next(iter(clients.items()))
            job, outputs = jobs[0]
            # one with more outputs than there are places goes in when nobody else is there
            if self.num_inside and self.num_inside + outputs > self.places:
                return
            jobs.popleft()
            self.num_waiting -= 1
            clients.move_to_end(key)
            if not jobs:
                del clients[key]
            if not clients:
                del self._waiting[priority]
            self._inside[job] = outputs
            self.num_inside += outputs
            yield job

    def done(self, job: J) -> None:
        """The job has ended, wherever it was."""
        outputs = self._inside.pop(job, None)
        if outputs is not None:
            self.num_inside -= outputs
            return
        for priority, clients in self._waiting.items():
            for key, jobs in clients.items():
                for index, (other, _) in enumerate(jobs):
                    if other is job or other == job:
                        del jobs[index]
                        self.num_waiting -= 1
                        if not jobs:
                            del clients[key]
                        if not clients:
                            del self._waiting[priority]
                        return

    def _retry_s(self) -> int:
        return max(1, min(60, self.num_waiting // max(1, self.places) // 4))
