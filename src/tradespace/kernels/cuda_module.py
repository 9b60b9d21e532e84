"""CUDA C++ kernels: compiled by NVRTC, which every CUDA build of torch brings, kept in the cache by source and architecture, launched through the driver.

For what Triton cannot say: a kernel that fills its shared memory before the one before it has ended. Nothing here is needed where there is no such kernel:
`find_kernel` then gives None, and the callers have a Triton kernel of the same meaning.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from tradespace.errors import UnsupportedError
from tradespace.home import cache_folder

PRIMITIVES = Path(__file__).with_name("cuda_primitives.cuh")
LEAST_CAPABILITY = (9, 0)
_REFUSED: dict[torch.device, str] = {}
OPTIONS = ("-std=c++17", "-default-device")
DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
CARVE_OUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, a percentage
PROGRAMMATIC = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
RESERVED_SHARED = 1024  # bytes of shared memory that each block takes beyond its own


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id, and a union of 64 bytes of which we set one int."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


class Function:
    """A kernel on one device."""

    def __init__(self, driver: Any, handle: ctypes.c_void_p, module: ctypes.c_void_p):
        self._driver, self._handle, self._module = driver, handle, module  # the module lives as long as its kernels may be in a graph: for good
        self._attribute = _Attribute(id=PROGRAMMATIC, value=1)
        self._shared = 0

    def __call__(self, blocks: tuple[int, int], threads: int, shared_bytes: int, parameters: ctypes.Structure, stream: int, *, pdl: bool) -> None:
        """Launches it with one structure as its parameter. pdl: it may be set up while the kernel before it runs, and waits for that itself."""
        if shared_bytes > self._shared:
            _check(self._driver.cuFuncSetAttribute(self._handle, DYNAMIC_SHARED, shared_bytes), "cuFuncSetAttribute")
            self._shared = shared_bytes
        config = _Config(*blocks, 1, threads, 1, 1, shared_bytes, stream, ctypes.pointer(self._attribute), 1 if pdl else 0)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        _check(self._driver.cuLaunchKernelEx(ctypes.byref(config), self._handle, pointers, None), "cuLaunchKernelEx")


def _check(result: int, call: str) -> None:
    if result:
        raise UnsupportedError(f"{call} failed with error {result} of the CUDA driver")


@lru_cache(maxsize=4096)
def prefer_shared(handle: int) -> None:
    """A kernel that runs beside one with much shared memory leaves a multiprocessor's division as that one needs it: to divide it anew it must be empty. Else
    one that finds no room there lies twice on another, and those after it as well, to the end of the step.
    """
    _check(_driver().cuFuncSetAttribute(ctypes.c_void_p(handle), CARVE_OUT, 100), "cuFuncSetAttribute")


@lru_cache(maxsize=1)
def _driver() -> Any:
    """libcuda, of which torch's own use is the proof that it is there."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UnsupportedError(f"the CUDA driver's library cannot be loaded: {error}") from None


def _nvrtc() -> Any:
    """The NVRTC of the CUDA release that torch was built for."""
    major = (torch.version.cuda or "").partition(".")[0]
    name = f"libnvrtc.so.{major}"
    folders = [Path(torch.__file__).parents[1] / "nvidia" / part / "lib" for part in (f"cu{major}", "cuda_nvrtc")]
    for place in (name, *(str(folder / name) for folder in folders)):
        with suppress(OSError):
            return ctypes.CDLL(place)
    raise UnsupportedError(f"{name} is not there: the nvidia-cuda-nvrtc package that torch's CUDA builds depend on is missing")


def whole_source(path: Path, instance: str) -> str:
    """A kernel's source between what stands before all of them and the one instance that is wanted."""
    return f"{PRIMITIVES.read_text(encoding='utf-8')}{path.read_text(encoding='utf-8')}{instance}\n"


def compile_source(source: str, architecture: str) -> bytes:
    """A cubin. Raises UnsupportedError where there is no NVRTC or it does not know the architecture."""
    nvrtc, program, size = _nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    options = [f"--gpu-architecture={architecture}".encode(), *(option.encode() for option in OPTIONS)]
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None):
        raise UnsupportedError("NVRTC takes no program")
    try:
        failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if failed:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise UnsupportedError(f"NVRTC for {architecture}: {log.value.decode(errors='replace').strip() or f'error {failed}'}")
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def kept_cubin(source: str, architecture: str) -> bytes:
    """`compile_source` once per source, options, CUDA release and architecture; the file is written under another name and renamed."""
    key = hashlib.sha256("\0".join((source, architecture, str(torch.version.cuda), *OPTIONS)).encode()).hexdigest()[:24]
    path = cache_folder() / "cuda" / f"{architecture}-{key}.cubin"
    with suppress(OSError):
        if found := path.read_bytes():
            return found
    cubin = compile_source(source, architecture)
    with suppress(OSError):  # a folder that cannot be written costs seconds at the next start, no more
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        with temporary.open("wb") as stream:
            stream.write(cubin)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    return cubin


@lru_cache(maxsize=64)
def find_kernel(path: Path, name: str, instance: str, device: torch.device) -> Function | None:
    """`load`, or None where such kernels cannot run: `why_not` says why."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return None
    try:
        return load(path, name, instance, device)
    except UnsupportedError as error:
        _REFUSED[device] = str(error)
        return None


def why_not(device: torch.device) -> str | None:
    """Why kernels in CUDA C++ do not run on this device, though it could run them; None where they do, or nobody has asked for them."""
    return _REFUSED.get(device)


def describe(device: torch.device) -> str:
    """What `doctor` says of them: whether kernels in CUDA C++ run on this device."""
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return f"Triton's alone: those in CUDA C++ need compute capability {'.'.join(map(str, LEAST_CAPABILITY))}"
    try:
        _driver()
        _nvrtc()
    except UnsupportedError as error:
        return f"Triton's alone, decode of one sequence is slower for it: {error}"
    return f"Triton's, and CUDA C++ compiled by NVRTC {torch.version.cuda}"


def load(path: Path, name: str, instance: str, device: torch.device) -> Function:
    """One kernel of a source file, on a device: its name, and the line that makes it. Raises UnsupportedError with the reason where that cannot be."""
    driver, capability = _driver(), torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        torch.cuda.current_stream(device).synchronize()  # makes the device's context the thread's
        cubin = kept_cubin(whole_source(path, instance), f"sm_{capability[0]}{capability[1]}")
        module, handle = ctypes.c_void_p(), ctypes.c_void_p()
        _check(driver.cuModuleLoadData(ctypes.byref(module), cubin), "cuModuleLoadData")
        _check(driver.cuModuleGetFunction(ctypes.byref(handle), module, name.encode()), f"cuModuleGetFunction of {name}")
        assert handle.value is not None
        prefer_shared(handle.value)
        return Function(driver, handle, module)
