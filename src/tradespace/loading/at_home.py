"""Weights that other tools have already put on this machine: ollama's blobs, llama.cpp's cache, LM Studio's folder. Nothing is copied or changed.

ollama      OLLAMA_MODELS or ~/.ollama/models: manifests/HOST/NAMESPACE/NAME/TAG names the blob that is the GGUF file
llama.cpp   LLAMA_CACHE or the system's cache folder, llama.cpp in it: ORG_REPO_FILE.gguf
LM Studio   ~/.lmstudio/models or ~/.cache/lm-studio/models: ORG/REPO/FILE.gguf
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from tradespace.errors import CorruptFileError, InputError
from tradespace.loading.hub import HubName

OLLAMA = "ollama:"
MAX_MANIFEST_BYTES = 1 << 20
_MODEL_LAYER = "application/vnd.ollama.image.model"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class FoundWeights:
    """A GGUF file of another tool. `name` is what `run` and `plan` take."""

    name: str
    tool: Literal["ollama", "llama.cpp", "LM Studio"]
    path: Path


def is_ollama(model: str) -> bool:
    return model.startswith(OLLAMA)


def ollama_folder() -> Path:
    return Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models").expanduser()


def llama_cpp_folder() -> Path:
    """Where llama.cpp keeps what it has downloaded."""
    if os.environ.get("LLAMA_CACHE"):
        return Path(os.environ["LLAMA_CACHE"]).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "llama.cpp"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "llama.cpp"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "llama.cpp"


def lm_studio_folders() -> tuple[Path, ...]:
    return Path.home() / ".lmstudio" / "models", Path.home() / ".cache" / "lm-studio" / "models"


def find_ollama(model: str) -> Path:
    """The GGUF blob of `ollama:NAME[:TAG]`. Raises InputError with what ollama has here, CorruptFileError for a manifest that names no file."""
    parts = model.removeprefix(OLLAMA).split("/")
    last, _, tag = parts[-1].partition(":")
    if not last or any(part in ("", ".", "..") or "\\" in part for part in [*parts[:-1], last]) or len(parts) > 3 or tag in (".", "..") or "/" in tag:
        raise InputError(f"'{model[:100]}' is not an ollama name. Write ollama:NAME or ollama:NAME:TAG, as `ollama list` shows them")
    host, namespace = {1: ("registry.ollama.ai", "library"), 2: ("registry.ollama.ai", parts[0])}.get(len(parts), (parts[0], parts[1 % len(parts)]))
    manifest = ollama_folder() / "manifests" / host / namespace / last / (tag or "latest")
    if not manifest.is_file():
        names = [found.name for found in list_ollama()]
        near = get_close_matches(model, names, n=3, cutoff=0.4) or names[:5]
        here = f"Here: {', '.join(near)}" if near else f"ollama has no models in {ollama_folder()} (OLLAMA_MODELS)"
        raise InputError(f"{model[:100]} is not among ollama's models on this machine. {here}. To fetch it: ollama pull {model.removeprefix(OLLAMA)[:100]}")
    return _blob(manifest)


def _blob(manifest: Path) -> Path:
    try:
        layers = json.loads(manifest.read_bytes()[:MAX_MANIFEST_BYTES])["layers"]
        digest = next(layer["digest"] for layer in layers if layer["mediaType"] == _MODEL_LAYER)
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise CorruptFileError(f"{manifest} names no model file ({type(error).__name__}). Pull it again with ollama") from error
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise CorruptFileError(f"{manifest} names '{str(digest)[:80]}', which is no sha256 digest. Pull it again with ollama")
    path = ollama_folder() / "blobs" / digest.replace(":", "-")
    if not path.is_file():
        raise CorruptFileError(f"{manifest} names {path}, which is not there. Pull it again with ollama")
    return path


def list_ollama() -> list[FoundWeights]:
    """Models whose blob is here."""
    found = []
    root = ollama_folder() / "manifests"
    for manifest in sorted(root.glob("*/*/*/*")) if root.is_dir() else []:
        host, namespace, name, tag = manifest.relative_to(root).parts
        prefix = "" if (host, namespace) == ("registry.ollama.ai", "library") else f"{namespace}/" if host == "registry.ollama.ai" else f"{host}/{namespace}/"
        try:
            path = _blob(manifest)
        except (CorruptFileError, OSError):
            continue
        found.append(FoundWeights(name=f"{OLLAMA}{prefix}{name}{'' if tag == 'latest' else f':{tag}'}", tool="ollama", path=path))
    return found


def find_gguf(hub_name: HubName) -> FoundWeights | None:
    """`org/name:FILE.gguf` where llama.cpp or LM Studio have it already."""
    if hub_name.gguf_file is None:
        return None
    name, flat = f"{hub_name.repo}:{hub_name.gguf_file}", f"{hub_name.repo}/{hub_name.gguf_file}".replace("/", "_")
    in_cache = llama_cpp_folder() / flat
    if in_cache.is_file():
        return FoundWeights(name=name, tool="llama.cpp", path=in_cache)
    paths = (folder / hub_name.repo / hub_name.gguf_file for folder in lm_studio_folders())
    return next((FoundWeights(name=name, tool="LM Studio", path=path) for path in paths if path.is_file()), None)


def list_at_home() -> list[FoundWeights]:
    """All that other tools have here: by their own names where those lead back to the file, else by path."""
    found = list_ollama()
    folder = llama_cpp_folder()
    found += [FoundWeights(name=str(path), tool="llama.cpp", path=path) for path in sorted(folder.glob("*.gguf"))] if folder.is_dir() else []
    for folder in lm_studio_folders():
        for path in sorted(folder.glob("*/*/*.gguf")) if folder.is_dir() else []:
            org, repo, file = path.relative_to(folder).parts
            found.append(FoundWeights(name=f"{org}/{repo}:{file}", tool="LM Studio", path=path))
    return found
