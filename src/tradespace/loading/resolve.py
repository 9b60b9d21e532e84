"""A model's name → the files that it is made of, looked at but not read: configuration is parsed, weights are only found.

What is looked for: `config.json` with one or sharded safetensors in a folder, or one GGUF file, which carries its configuration, tokenizer
and template in its own metadata (those fields stay None here; `formats` and the tokenizer read them from there).
"""

import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tradespace.errors import CorruptFileError, InputError, UnsupportedError
from tradespace.loading.hub import INDEX_FILE, SINGLE_FILE, parse_hub_name, scan_cached_models
from tradespace.loading.packages import PACKAGED
from tradespace.units import MiB

MAX_CONFIG_BYTES = 16 * MiB
MAX_TEMPLATE_BYTES = 1 * MiB
MAX_SHOWN_CHARS = 200  # of a name, in an error


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Everything on disk that makes up one model. For kind "gguf" all but `weights` and `folder` are None: the file holds them."""

    name: str
    kind: Literal["gguf", "safetensors"]
    weights: tuple[Path, ...]
    folder: Path
    config: dict[str, Any] | None = None
    tokenizer_json: Path | None = None
    tokenizer_config: dict[str, Any] | None = None
    generation_config: dict[str, Any] | None = None
    chat_template: str | None = None
    tool_template: str | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files on disk."""
        return sum(path.stat().st_size for path in self.weights)


def _is_model_folder(path: str) -> bool:
    return os.path.isfile(os.path.join(path, "config.json"))


def unknown_model(model: str) -> InputError:
    """The error for a name that is no path, alias or Hub name, with the closest names that are."""
    folder, name = os.path.split(os.path.expanduser(model))
    candidates = [*PACKAGED, *(repo for repo, _, _ in scan_cached_models())]
    if os.path.isdir(folder or "."):
        candidates += [os.path.join(folder, entry) for entry in os.listdir(folder or ".") if folder or entry.endswith(".gguf") or _is_model_folder(entry)]
    near = difflib.get_close_matches(model[:MAX_SHOWN_CHARS], candidates, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    shown = f"{model[:MAX_SHOWN_CHARS]!a}" if not model[:MAX_SHOWN_CHARS].isprintable() else f"'{model[:MAX_SHOWN_CHARS]}'"
    if folder or name.endswith((".gguf", ".safetensors")):
        return InputError(f"{shown} does not exist.{hint} Give a folder, a .gguf file, org/name from the Hub, or one of: {', '.join(PACKAGED)}")
    where = "A published model's name can be planned (tradespace plan) but not run: its weights come as org/name from the Hub, a folder or a .gguf file"
    return InputError(f"{shown} names no weights.{hint} Known aliases: {', '.join(PACKAGED)}. {where}")


def resolve(
    model: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    download: bool = True,
    progress: bool = True,
    cache_dir: str | Path | None = None,
) -> ModelFiles:
    """Find (and with `download`, fetch) the files of `model`, and say clearly what is missing.

    Raises InputError for an unknown name or a folder that is not a model, CorruptFileError for configuration that cannot be parsed,
    UnsupportedError for weights in a form that tradespace does not read, DownloadError from the network.
    """
    from tradespace.loading.pull import find_fetched, is_local, pull

    if download or is_local(model):
        path = pull(model, revision=revision, offline=offline, progress=progress, cache_dir=cache_dir)
    else:
        found = find_fetched(model, revision=revision, cache_dir=cache_dir)
        if found is None:
            if model not in PACKAGED and parse_hub_name(model) is None:
                raise unknown_model(model)
            raise InputError(f"{model} is not on this machine yet. Run: tradespace pull {model}")
        path = found
    return _gguf(model, path) if path.is_file() else _folder(model, path)


def _gguf(model: str, path: Path) -> ModelFiles:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return ModelFiles(name=model, kind="gguf", weights=(path,), folder=path.parent)
    if path.suffix == ".gguf":
        raise CorruptFileError(f"{path} is not a GGUF file: it begins with {magic!r} instead of b'GGUF'. Fetch it again")
    if path.suffix == ".safetensors":
        raise InputError(f"{path} is weights alone, without config.json and tokenizer. Give the folder that holds all of them: {path.parent}")
    raise UnsupportedError(f"{path} is neither a GGUF file nor a model's folder. Give a .gguf file, or a folder with config.json and safetensors")


def _folder(model: str, folder: Path) -> ModelFiles:
    if not (folder / "config.json").is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        if len(ggufs) == 1:
            return _gguf(model, ggufs[0])
        if ggufs:
            raise InputError(f"{folder} holds {len(ggufs)} GGUF files. Name one of them: {', '.join(path.name for path in ggufs[:10])}")
        raise InputError(f"{folder} has no config.json, so it is not a model's folder. It needs config.json, tokenizer.json and *.safetensors")
    tokenizer_config = read_json_object(folder / "tokenizer_config.json")
    tokenizer_json = folder / "tokenizer.json"
    return ModelFiles(
        name=model,
        kind="safetensors",
        weights=_safetensors(folder),
        folder=folder,
        config=read_json_object(folder / "config.json"),
        tokenizer_json=tokenizer_json if tokenizer_json.is_file() else None,
        tokenizer_config=tokenizer_config,
        generation_config=read_json_object(folder / "generation_config.json"),
        chat_template=_chat_template(folder, tokenizer_config, "default"),
        tool_template=_chat_template(folder, tokenizer_config, "tool_use"),
    )


def _safetensors(folder: Path) -> tuple[Path, ...]:
    """The weight files: those that the index names, else model.safetensors, else the only one there is."""
    index = read_json_object(folder / INDEX_FILE)
    if index is None:
        files = [folder / SINGLE_FILE] if (folder / SINGLE_FILE).is_file() else sorted(folder.glob("*.safetensors"))
        if len(files) == 1:
            return tuple(files)
        if files:
            raise InputError(f"{folder} holds {len(files)} safetensors files and no {INDEX_FILE} that says which belong together. Fetch the index, too")
        pickles = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
        if pickles:
            raise UnsupportedError(f"{folder} holds pickled weights ({pickles[0]}), which can run code when they are read. Convert them to safetensors")
        raise InputError(f"{folder} has a config.json but no *.safetensors. Fetch the weights, or plan without them: tradespace plan {folder}")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise CorruptFileError(f"{folder / INDEX_FILE}: 'weight_map' is not a map from tensors to files. Fetch it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:  # an index must not lead out of its folder
            raise CorruptFileError(f"{folder / INDEX_FILE} names '{name}', which is not a file beside it")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        some = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        raise InputError(f"{folder} lacks {len(missing)} of {len(names)} weight files: {some}. Fetch them; a Hub model: run tradespace pull again")
    return tuple(folder / name for name in names)


def read_json_object(path: Path) -> dict[str, Any] | None:
    """A JSON file that must hold an object of at most 16 MiB; None if there is no such file. Raises CorruptFileError."""
    if not path.is_file():
        return None
    size_bytes = path.stat().st_size
    if size_bytes > MAX_CONFIG_BYTES:
        raise CorruptFileError(f"{path} is {size_bytes} bytes; configuration has at most {MAX_CONFIG_BYTES}. Is it another file under this name?")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested by the thousand
        raise CorruptFileError(f"{path} is not JSON ({type(error).__name__}: {str(error)[:200]}). Fetch it again") from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path} holds a JSON {type(value).__name__}, not an object. Fetch it again")
    return value


def _chat_template(folder: Path, tokenizer_config: dict[str, Any] | None, name: str) -> str | None:
    """The template in the order in which transformers prefers them: chat_template.jinja, chat_template.json, tokenizer_config.json.

    name: "default", or "tool_use" for the one that a few models have beside it for conversations with tools.
    """
    jinja = folder / "chat_template.jinja"
    if jinja.is_file() and name == "default":
        if jinja.stat().st_size > MAX_TEMPLATE_BYTES:
            raise CorruptFileError(f"{jinja} is {jinja.stat().st_size} bytes; a chat template has at most {MAX_TEMPLATE_BYTES}")
        try:
            return jinja.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CorruptFileError(f"{jinja} is not UTF-8 ({error.reason} at byte {error.start}). Fetch it again") from error
    for source in (read_json_object(folder / "chat_template.json"), tokenizer_config):
        template = (source or {}).get("chat_template")
        if isinstance(template, str) and name == "default":
            return template
        if isinstance(template, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            if isinstance(named.get(name), str):
                return named[name]
    return None
