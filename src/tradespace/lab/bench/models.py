"""The files that engines are compared on, made here where nobody publishes them, and kept in the cache under names that say what they were made of.

random:NAME   a zoo model's shape with random weights, tensor by tensor: as fast as the real one, and nothing to fetch
a format      a model's weights rounded to nearest in q4_0, q8_0 …, embedding and head in q8_0, as a GGUF file (from a GGUF file, whose tokenizer it keeps)
floats        the same weights dequantized to bf16 safetensors, for engines that read nothing else
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from tradespace.errors import InputError
from tradespace.home import cache_folder
from tradespace.loading.resolve import resolve

RANDOM = "random:"
RANDOM_FORMATS = ("q4_0", "q8_0")
EMBED = "q8_0"
_STD = 0.02  # of random weights: the scale of trained ones
_BLOCK = {"q4_0": (18, 4.6), "q8_0": (34, 74.0)}  # bytes of 32 weights, and the deviation of their codes


def prepare(model: str, *, file_format: str | None = None, offline: bool = False, say: Callable[[str], None] = lambda line: None) -> Path:
    """The GGUF file (or the folder) that `model` means; with `file_format` re-made in that format first. Raises InputError for what cannot be made."""
    if model.startswith(RANDOM):
        return _random(model.removeprefix(RANDOM), file_format or "q4_0", say)
    files = resolve(model, offline=offline)
    source = files.weights[0] if files.kind == "gguf" else files.folder
    if file_format is None:
        return source
    if files.kind != "gguf":
        raise InputError(f"--file-format {file_format} is made of a GGUF file, whose tokenizer it keeps; {model} is a folder. Give its .gguf file")
    return _made(source, f"{file_format}.gguf", lambda target: _quantized(source, target, file_format), say)


def floats_folder(source: Path, say: Callable[[str], None] = lambda line: None) -> Path:
    """`source` itself where it is a folder; for a GGUF file a folder with its weights in bf16."""
    return source if source.is_dir() else _made(source, "bf16", lambda target: _quantized(source, target, "bf16"), say)


def _made(source: Path, suffix: str, make: Callable[[Path], None], say: Callable[[str], None]) -> Path:
    """What `make` makes of `source`, kept under a name that changes with the file."""
    state = source.stat()
    mark = hashlib.sha256(f"{source.resolve()}\0{state.st_size}\0{state.st_mtime_ns}".encode()).hexdigest()[:8]
    target = cache_folder() / "bench" / f"{source.stem}-{mark}-{suffix}"
    if not target.exists():
        say(f"making {target.name} once")
        target.parent.mkdir(parents=True, exist_ok=True)
        make(target)
    return target


def _quantized(source: Path, target: Path, file_format: str) -> None:
    from tradespace.quantizing import quantize

    if file_format == "bf16":
        quantize(source, target, format="bf16", method="rtn")
    else:
        quantize(source, target, format=file_format, embed=EMBED, method="rtn", to="gguf")


def _random(name: str, file_format: str, say: Callable[[str], None]) -> Path:
    if file_format not in RANDOM_FORMATS:
        raise InputError(f"--file-format {file_format}: random weights are made in {' or '.join(RANDOM_FORMATS)}")
    target = cache_folder() / "bench" / f"random-{name}-{file_format}.gguf"
    if not target.exists():
        say(f"making {target.name} once")
        target.parent.mkdir(parents=True, exist_ok=True)
        write_random(name, file_format, target)
    return target


def write_random(name: str, file_format: str, target: Path) -> None:
    """A zoo model's shape as a GGUF file: matrices of random blocks, norms of ones, a vocabulary of bytes and of tokens that nobody writes.

    Holds a few MiB at a time. Raises InputError for a name that the zoo lacks, UnsupportedError for a family that is not written to GGUF.
    """
    import torch

    from tradespace.formats.codes import Codes
    from tradespace.loading.gguf_export import write_model
    from tradespace.spec.tensors import TensorSpec, model_tensors
    from tradespace.spec.zoo import find_model

    spec = find_model(name)
    shapes = {tensor.name: tensor.shape for tensor in model_tensors(spec)}
    roles = {tensor.name: tensor.role for tensor in model_tensors(spec)}
    generator = torch.Generator().manual_seed(0)

    def format_of(tensor: TensorSpec) -> str:
        return EMBED if tensor.role in ("embed", "lm_head") else file_format

    def rows(tensor: str, start: int, stop: int) -> Codes | torch.Tensor:
        shape = shapes[tensor]
        if len(shape) == 1:
            return torch.full((stop - start,), float(roles[tensor] == "norm"))
        block, deviation = _BLOCK[EMBED if roles[tensor] in ("embed", "lm_head") else file_format]
        blocks = torch.randint(0, 256, (stop - start, shape[1] // 32, block), generator=generator, dtype=torch.uint8)
        blocks[..., :2] = torch.tensor([_STD / deviation], dtype=torch.float16).view(torch.uint8)
        return Codes(blocks.flatten(1))

    with TemporaryDirectory(dir=target.parent) as folder:
        _write_vocabulary(Path(folder))
        (Path(folder) / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
        (Path(folder) / "model.safetensors").touch()
        files = resolve(folder, download=False)
        written = Path(folder) / "model.gguf"
        write_model(written, spec, files, format_of=format_of, rows=rows)
        shutil.move(written, target)


def _write_vocabulary(folder: Path) -> None:
    """tokenizer.json with the 256 bytes, a begin, an end, and one merge, since a GGUF file has no empty lists."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index + 2 for index, token in enumerate([*alphabet, "ab"])}, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    text = json.loads(tokenizer.to_str())
    kept = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    text["added_tokens"] = [{"id": index, "content": content, **kept} for index, content in enumerate(("<s>", "</s>"))]
    text["model"]["vocab"] |= {"<s>": 0, "</s>": 1}
    (folder / "tokenizer.json").write_text(json.dumps(text))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
