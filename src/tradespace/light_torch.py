"""`import torch` for a process that only runs models: without what tensors on the "meta" device, fake tensors and compilers need.

`import torch` registers in Python how a thousand operators act on tensors that have no data, with all decompositions that this takes: a third of its time and
18 MiB, for torch.compile, torch.export and the like, which running a model does not touch. `begin` leaves a stand-in in the place of that one module. The real
one takes it over as soon as anything imports what is built on it, or asks it for an attribute; models run the same without.
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


class _Watch:
    """A finder of modules that finds none: it sees who imports what."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name in FIRST_SIGNS:
            complete()
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


def complete() -> None:
    """Puts the real module where `begin` left its stand-in; does nothing where there is none."""
    with _lock:
        if not isinstance(sys.modules.get(DEFERRED), _Deferred):
            return
        sys.meta_path.remove(_watch)  # pyright: ignore[reportArgumentType]
        del sys.modules[DEFERRED]
        importlib.import_module(DEFERRED)
