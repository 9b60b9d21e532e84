"""Prometheus metrics under the names and suffixes that vLLM's users know, each behind a prefix of the operator's choice; and the ledger's lines beside them."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tradespace.server.link import Job
from tradespace.server.messages import Load, Progress, Snapshot

TTFT_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
ITL_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40)
E2E_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)


class Metrics:
    """One server's metrics in a registry of their own."""

    def __init__(self, *, prefix: str, model: str):
        self.registry = CollectorRegistry()
        self._model, self._prefix = model, prefix
        self.running = self._gauge("num_requests_running", "Requests in the engine's batch.")
        self.waiting = self._gauge("num_requests_waiting", "Requests waiting, in the server's queue and in the engine's.")
        self.cache = self._gauge("kv_cache_usage_perc", "Share of the cache's blocks in use; 1 is all of them.")
        self.queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self.hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.preemptions = self._counter("num_preemptions", "Requests that had to give their blocks to others and were computed again.")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that began to answer.")
        self.generated = self._counter("generation_tokens", "Tokens generated.")
        self.ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", TTFT_S)
        self.itl = self._histogram("inter_token_latency_seconds", "Between two tokens of an output; of outputs that are not streamed, their mean.", ITL_S)
        self.e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the end.", E2E_S)
        labels = ["model_name", "finished_reason"]
        self.success = Counter(f"{prefix}:request_success", "Requests that ended, by why.", labels, registry=self.registry)
        self.ledger = Gauge(f"{prefix}:ledger_bytes", "Lines of the memory ledger.", ["model_name", "line", "kind"], registry=self.registry)
        self.memory = Gauge(f"{prefix}:memory_bytes", "Memory of the whole server.", ["model_name", "kind"], registry=self.registry)
        self._seen = Load()
        self._last: dict[tuple[int, int], float] = {}

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"{self._prefix}:{name}", text, ["model_name"], registry=self.registry).labels(self._model)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"{self._prefix}:{name}", text, ["model_name"], registry=self.registry).labels(self._model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{self._prefix}:{name}", text, ["model_name"], registry=self.registry, buckets=buckets).labels(self._model)

    def on_progress(self, progress: Progress) -> None:
        load, seen, self._seen = progress.load, self._seen, progress.load
        if load.prefix_cache_queries < seen.prefix_cache_queries or load.preemptions < seen.preemptions:
            seen = Load()  # the engine was started anew
        self.queries.inc(load.prefix_cache_queries - seen.prefix_cache_queries)
        self.hits.inc(load.prefix_cache_hits - seen.prefix_cache_hits)
        self.preemptions.inc(load.preemptions - seen.preemptions)
        now_s = time.perf_counter()
        for piece in progress.pieces:
            count = len(piece.tokens)
            self.generated.inc(count)
            key = (piece.id, piece.sample)
            last_s = self._last.pop(key, None) if piece.finish_reason else self._last.get(key)
            if piece.finish_reason is None:
                self._last[key] = now_s
            if last_s is not None and count:
                self.itl.observe((now_s - last_s) / count)

    def on_end(self, job: Job, reason: str) -> None:
        now_s = time.perf_counter()
        for sample in range(job.outputs):
            self._last.pop((job.id, sample), None)
        self.success.labels(self._model, reason).inc()
        self.e2e.observe(now_s - job.arrived_s)
        if job.first_s is not None:
            self.ttft.observe(job.first_s - job.arrived_s)
            self.prompt_tokens.inc(len(job.prompt_ids))

    def text(self, load: Load, waiting: int, snapshot: Snapshot | None, front_bytes: int, outside_bytes: int) -> bytes:
        """The exposition format."""
        self.running.set(load.running)
        self.waiting.set(load.waiting + waiting)
        self.cache.set(load.used_blocks / load.num_blocks if load.num_blocks else 0)
        if snapshot is not None:
            for name, predicted, measured in snapshot.ledger:
                for kind, value in (("predicted", predicted), ("measured", measured)):
                    if value is not None:
                        self.ledger.labels(self._model, name, kind).set(value)
            self.memory.labels(self._model, "budget").set(snapshot.budget_bytes + outside_bytes)
            self.memory.labels(self._model, "now").set(snapshot.now_bytes + front_bytes)
            self.memory.labels(self._model, "peak").set(snapshot.peak_bytes + front_bytes)
        return generate_latest(self.registry)
