"""gpt-fast's side of `gpu_peers.gpt_fast`: its model and its quantized layers, compiled as its generate.py compiles them, with random weights."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tradespace.measure.record import write_atomically

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTH = 2048  # positions that its cache holds
WARM_UP = 4  # steps, the first of which compile
GROUP, INNER_TILES = 128, 8  # of its int4 layers


def drawn(transformer: Any, kind: str) -> nn.Module:
    """Its model of this kind, with random weights on the device."""
    with torch.device("meta"):
        model = transformer().to(torch.bfloat16)
    if kind != "bf16":
        sys.modules.setdefault("tokenizer", types.ModuleType("tokenizer")).get_tokenizer = None  # pyright: ignore[reportAttributeAccessIssue]
        quantize: Any = importlib.import_module("quantize")
        handlers = {"int8": lambda: quantize.WeightOnlyInt8QuantHandler(model)}
        handlers["int4-g128"] = lambda: quantize.WeightOnlyInt4QuantHandler(model, GROUP, INNER_TILES, False)
        model = handlers[kind]().convert_for_runtime()
    model = model.to_empty(device=DEVICE)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype.is_floating_point:
            tensor.data.normal_(0, 0.02)
        else:
            low, high = (-127, 127) if tensor.dtype == torch.int8 else (0, 2**31 - 1)
            tensor.data.random_(low, high)
    return model.eval()


def stepped(model: Any) -> Any:
    """One step: (ids (1, 1), position (1,)) → the next id; as generate.py does it, with a block mask where its version takes one."""
    if "mask" not in inspect.signature(model.forward).parameters:
        return lambda ids, position: model(ids, position).argmax(-1).to(torch.int32)
    from torch.nn.attention.flex_attention import create_block_mask

    whole: Any = create_block_mask(lambda b, h, q, kv: q >= kv, 1, 1, LENGTH, LENGTH, device=DEVICE)

    def step(ids: Tensor, position: Tensor) -> Tensor:
        mask = whole[:, :, position // whole.BLOCK_SIZE[0]]
        mask.mask_mod, mask.seq_lengths = whole.mask_mod, (1, LENGTH)
        return model(mask, ids, position).argmax(-1).to(torch.int32)

    return step


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def main(question: str, answer: str) -> None:
    given: dict[str, Any] = json.loads(Path(question).read_text())
    sys.path.insert(0, given["folder"])
    import torch._inductor.config as inductor
    from torch.nn.attention import SDPBackend, sdpa_kernel

    transformer: Any = importlib.import_module("model").Transformer
    inductor.coordinate_descent_tuning = True
    inductor.triton.unique_kernel_names = True
    started = time.perf_counter()
    model = drawn(lambda: transformer.from_name(given["shape"]), given["kind"])
    with torch.device(DEVICE):
        model.setup_caches(1, LENGTH)  # pyright: ignore[reportCallIssue]
    step: Any = torch.compile(stepped(model), mode="reduce-overhead", fullgraph=True)
    ids, position = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE), torch.tensor([given["prompt"]], device=DEVICE)
    speeds = []
    with sdpa_kernel(SDPBackend.MATH):  # generate.py leaves attention to the compiler
        for _ in range(WARM_UP):
            ids = step(ids, position).clone()
            position += 1
        wait()
        start_up_s = time.perf_counter() - started
        for _ in range(given["rounds"]):
            position.fill_(given["prompt"])
            wait()
            began = time.perf_counter()
            for _ in range(given["tokens"]):
                ids = step(ids, position).clone()
                position += 1
            wait()
            speeds.append(given["tokens"] / (time.perf_counter() - began))
    result = {"name": f"gpt-fast (torch {torch.__version__})", "settings": f"{given['kind']}, compiled", "start_up_s": start_up_s, "answer": speeds}
    write_atomically(Path(answer), json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
