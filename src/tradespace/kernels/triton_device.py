"""What Triton kernels ask of a device: whether they run there at all, and which entry of a table of tile sizes is its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection

import torch

from tradespace.kernels.attention.triton_interpreter import interprets

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def device_refusal(what: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernel that is called `what` does not run with activations of `dtype` on `device`; None: it runs."""
    if dtype not in FLOATS:
        return f"{what} takes fp32, bf16 and fp16, not {dtype}"
    if importlib.util.find_spec("triton") is None:
        return f"{what} needs Triton (pip install 'tradespace[gpu]')"
    if device.type != "cuda" and not interprets():
        return f"{what} runs on CUDA devices, not on {device.type} (except under Triton's interpreter, TRITON_INTERPRET=1, which is for tests)"
    return None


def listed_device(names: Collection[str], device: torch.device) -> str:
    """Of a table's entries ("sm80", "sm90", …, "interpreter") the one for `device`: the nearest at or below it in compute capability, else the lowest."""
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    known = sorted((name for name in names if name.startswith("sm")), key=lambda name: int(name[2:]))
    return max((name for name in known if int(name[2:]) <= 10 * major + minor), key=lambda name: int(name[2:]), default=known[0])
