"""How long a user waits: `tradespace run` of a checkpoint in safetensors on a GPU, from typing it to the first byte of its answer.

The checkpoint is drawn at random in a model's shape and under the names of its family, a file a layer, and has just been written, so that it lies in the page
cache. The first run compiles the kernels into an empty cache; the others find them there.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from tradespace.lab.common import data_file
from tradespace.lab.timing import first_byte_s, users_environment
from tradespace.loading.names import Piece, hugging_face_pieces
from tradespace.quantize.hf_config import config_from_spec, write_json
from tradespace.quantize.shards import write_shard
from tradespace.spec.model import ModelSpec
from tradespace.tuning_models import train_tokenizer
from tradespace.units import format_bytes

VOCABULARY = 512  # of the tokenizer; the model's own is larger, and the rest of its tokens are never drawn
PROMPT = "The capital of France is"
WARM_RUNS = 3
WRITERS = 4  # files under way at once


@torch.no_grad()
def write_checkpoint(spec: ModelSpec, folder: Path, device: torch.device) -> int:
    """A Hugging Face folder of `spec`'s shape with random weights in bf16, a shard a layer; returns the bytes of its weights."""
    draw = torch.Generator(device).manual_seed(0)

    def layer_of(piece: Piece) -> str:
        name = piece.target.split(".")
        return name[1] if name[0] == "layers" else "outside"

    weight_map, total = {}, 0
    pieces = sorted(hugging_face_pieces(spec, ()), key=layer_of)
    with ThreadPoolExecutor(WRITERS) as writers:
        waiting = []
        for layer, of_layer in groupby(pieces, layer_of):
            tensors = {}
            for piece in of_layer:
                shape = piece.source_shape
                values = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=draw, device=device).mul_(0.02)
                tensors[piece.source] = values.bfloat16().cpu()
            waiting.append(writers.submit(write_shard, folder / f"model-{layer}.safetensors", tensors))
            weight_map |= dict.fromkeys(tensors, f"model-{layer}.safetensors")
            total += sum(tensor.nbytes for tensor in tensors.values())
        for each in waiting:
            each.result()
    write_json(folder / "config.json", config_from_spec(spec))
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    train_tokenizer([data_file("pd-books", "valid.txt")], VOCABULARY, folder)
    return total


def start_rows(spec: ModelSpec, memory: str, say: Callable[[str], None], *, device: str = "cuda", warm_runs: int = WARM_RUNS) -> Iterator[dict[str, Any]]:
    """Seconds to the first byte: cold (kernels compiled on the way), then warm. Raises EngineError where a run prints nothing."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        model.mkdir()
        nbytes = write_checkpoint(spec, model, torch.device(device))
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        say(f"{spec.name} in bf16, {format_bytes(nbytes)} of safetensors, written")
        command = [sys.executable, "-m", "tradespace", "run", str(model), PROMPT, "--offline", "--device", device, "--memory", memory, "--max-tokens", "4"]
        environment = users_environment() | {"TRITON_CACHE_DIR": str(folder / "kernels")}
        for what, runs in (("cold", 1), ("warm", warm_runs)):
            seconds = [first_byte_s(command, environment) for _ in range(runs)]
            say(f"start-up, {what}: {', '.join(f'{each:.1f}' for each in seconds)} s to the first byte")
            yield {"what": what, "seconds": seconds, "nbytes": nbytes}


__all__ = ["start_rows", "write_checkpoint"]
