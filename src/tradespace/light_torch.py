"""`import torch` for a process that only runs models: without what tensors on the "meta" device, fake tensors and compilers need.

`import torch` registers in Python how a thousand operators act on tensors that have no data, with all decompositions that this takes: much of its time and
memory, for torch.compile, torch.export and the like, which running a model does not touch. `begin` leaves a stand-in in the place of that one module. The
real one takes it over as soon as anything imports what is built on it, or asks it for an attribute; models run the same without.
"""

from __future__ import annotations

import importlib
import re
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

DEFERRED = "torch._meta_registrations"
# whoever works on tensors without data imports one of these: FakeTensorMode asks the first for its tables
FIRST_SIGNS = ("torch._decomp", "torch._refs", "torch._prims", "torch._dynamo", "torch._inductor")
VERSIONS = ("2.11.", "2.12.", "2.13.")  # that were looked at; others are imported whole


class _Deferred(ModuleType):
    """Stands in `sys.modules` for the module, and loads it when it is asked for anything."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        complete()
        return getattr(sys.modules[DEFERRED], name)


class _Loaded:
    """Loader of a module that was loaded while it was looked for: it stays as it is. To run twice would leave it with empty tables."""

    def __init__(self, module: ModuleType):
        self._module, self._spec = module, module.__spec__
        module.__spec__ = None  # else the import would go by this one, which runs the module, and not by ours

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


class _Watch:
    """A finder of modules that finds none of its own: it sees who imports what. It stays in its place, as the list of finders is being walked through."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name in FIRST_SIGNS and complete() and name in sys.modules:
            return ModuleSpec(name, _Loaded(sys.modules[name]))  # pyright: ignore[reportArgumentType]
        return None


_watch = _Watch()
_lock = threading.RLock()


def begin() -> bool:
    """Before the first `import torch` of a process. False where nothing was done: torch is imported already, is another version, or is not there."""
    if "torch" in sys.modules or not _installed().startswith(VERSIONS):
        return False
    sys.modules[DEFERRED] = _Deferred(DEFERRED)
    sys.meta_path.insert(0, _watch)  # pyright: ignore[reportArgumentType]
    return True


def _installed() -> str:
    """The version of the torch that would be imported, "" where none is found: read from its file, as asking for a distribution's takes longer."""
    found = find_spec("torch")
    try:
        text = (Path(found.origin).parent / "version.py").read_text() if found is not None and found.origin is not None else ""
    except OSError:
        return ""
    stated = re.search(r"^__version__ = ['\"]([^'\"]+)", text, re.MULTILINE)
    return stated.group(1) if stated else ""


def complete() -> bool:
    """Puts the real module where `begin` left its stand-in. False where there is none."""
    with _lock:
        if not isinstance(sys.modules.get(DEFERRED), _Deferred):
            return False
        del sys.modules[DEFERRED]
        importlib.import_module(DEFERRED)
        return True
