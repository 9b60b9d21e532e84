"""What the machine allows, measured in the same rounds as the engines and in a process of its own: bytes a second at a size, operations a second."""

from __future__ import annotations

from typing import Any

from tradespace.lab.bench.task import Task

READ_BUDGET_S = 0.25


class Session:
    def __init__(self, task: Task, settings: dict[str, Any]):
        import torch

        torch.set_num_threads(task.threads)
        torch.set_grad_enabled(False)
        self._threads = task.threads

    def read(self, size_bytes: int) -> float:
        """Bytes/s of reading `size_bytes` over and over, the best of a quarter of a second."""
        from tradespace.measure.bandwidth import bandwidth_curve

        return next(iter(bandwidth_curve((size_bytes // 4096 * 4096,), self._threads, backend="torch", budget_s=READ_BUDGET_S)))[1]

    def multiply(self, dtype: str) -> float:
        """Operations/s of the best of torch's products in `dtype`."""
        from tradespace.measure.probe import matmul_rate, torch_products

        return matmul_rate(torch_products()[dtype])

    def facts(self) -> dict[str, str | int]:
        return {}
