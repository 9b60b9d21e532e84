"""Two test workers on two cores: threads of torch that spin while they wait would only take the other worker's time."""

import importlib.util
import os
from pathlib import Path

from tradespace.home import cache_folder

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if not Path("/dev/nvidia0").exists():  # Triton's kernels then run as NumPy; it asks when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    import torch
except ModuleNotFoundError:  # the pure half's tests run without it
    pass
else:
    torch.set_num_threads(1)

# tests move TRADESPACE_HOME about; the kernels are compiled once for all of them
os.environ.setdefault("TRADESPACE_KERNELS", str(cache_folder() / "kernels"))

if importlib.util.find_spec("triton") is None:  # nothing to collect doctests from
    collect_ignore_glob = ["src/tradespace/kernels/*triton_*"]
    collect_ignore = [f"src/tradespace/{name}.py" for name in ("formats/cuda", "kernels/attention/paged", "kernels/linear/large")]
