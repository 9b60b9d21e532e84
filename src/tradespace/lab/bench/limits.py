"""What the machine allows, measured in the same rounds as the engines and in a process of its own: bytes a second at a size, operations a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tradespace.lab.bench.task import Task
from tradespace.lab.timing import device_seconds

READ_BUDGET_S = 0.25
PRODUCT_ROWS = 8192  # of the square products that a device's rate is taken from


class Session:
    def __init__(self, task: Task, settings: dict[str, Any]):
        import torch

        torch.set_num_threads(task.threads)
        torch.set_grad_enabled(False)
        self._threads, self._device = task.threads, task.device

    def read(self, size_bytes: int) -> float:
        """Bytes/s of reading `size_bytes` over and over, the best of a quarter of a second; on a device the median of sums over at least 1 GiB."""
        if self._device != "cpu":
            return self._read_there(max(size_bytes, 2**30))
        from tradespace.measure.bandwidth import bandwidth_curve

        return next(iter(bandwidth_curve((size_bytes // 4096 * 4096,), self._threads, backend="torch", budget_s=READ_BUDGET_S)))[1]

    def multiply(self, dtype: str) -> float:
        """Operations/s of the best of torch's products in `dtype`; on a device those of square matrices."""
        if self._device != "cpu":
            return self._multiply_there(dtype)
        from tradespace.measure.probe import matmul_rate, torch_products

        return matmul_rate(torch_products()[dtype])

    def _read_there(self, size_bytes: int) -> float:
        import torch

        held = torch.zeros(size_bytes // 4, device=self._device)
        return held.nbytes / self._seconds_there(lambda: held.sum())

    def _multiply_there(self, dtype: str) -> float:
        import torch

        size = PRODUCT_ROWS
        if dtype == "int8":
            a, b = (torch.ones(size, size, dtype=torch.int8, device=self._device) for _ in range(2))
            return 2 * size**3 / self._seconds_there(lambda: torch._int_mm(a, b.t()))  # pyright: ignore[reportPrivateImportUsage]
        a, b = (torch.randn(size, size, device=self._device).to({"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)) for _ in range(2))
        return 2 * size**3 / self._seconds_there(lambda: a @ b)

    def _seconds_there(self, run: Callable[[], Any]) -> float:
        import torch

        with torch.cuda.device(self._device):
            return device_seconds(run)

    def facts(self) -> dict[str, str | int]:
        return {}
