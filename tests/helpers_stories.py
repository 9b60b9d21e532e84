"""A real trained Llama of 260,032 parameters (karpathy/tinyllamas, MIT) as ModelSpec and weights, out of llama2.c's flat fp32 file.

Layout: seven int32 (dim, FFN, layers, heads, KV heads, vocabulary, context), then embedding, attention norms, q, k, v, out, FFN norms, gate, down, up, final
norm, each over all layers, output dimension first; rotary tables follow and are not needed. Rotary pairs are (2i, 2i + 1). The head is tied.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tradespace.model.transformer import Transformer
from tradespace.quantize.rtn import fill_rtn
from tradespace.spec.model import Attention, DenseFFN, LayerSpec, ModelSpec, Rope
from tradespace.spec.weights import WeightPlan

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "stories260k"
BOS = 1
# what llama2.c's own program prints for an empty prompt, greedily: `expected_stdout` of its test_all.py, and the few words more that its doc/stories260K.md
# shows (github.com/karpathy/llama2.c at 350e04f, where both were compared with this text)
GREEDY_TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball. "
    "She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. "
    'She said, "I want to play with your ball, but I can\'t find it."\n'
    "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what to do.\"\n"
    "Lily didn't want to help her mom, so she said, \"I'm"
)


def stories_spec() -> ModelSpec:
    """The model's numbers; skips the test where the file is absent."""
    if not (FOLDER / "stories260K.bin").is_file():
        pytest.skip("the evaluation data (stories260k) is not beside this checkout")
    D, F, L, N, K, V, context = np.fromfile(FOLDER / "stories260K.bin", dtype="<i4", count=7).tolist()
    mixer = Attention(N=N, K=K, H=D // N, rope=Rope(dims=D // N, interleaved=True))
    return ModelSpec(name="stories260k", family="llama", D=D, V=abs(V), layers=(LayerSpec(mixer=mixer, ffn=DenseFFN(F=F)),) * L, max_context=context)


def load_stories(plan: WeightPlan, *, attention: str = "sdpa", linear: str = "torch", activations: str = "auto", max_context: int = 512) -> Transformer:
    """The model under any weight plan, on any kernels."""
    spec = stories_spec()
    model = Transformer(spec, plan, attention=attention, linear=linear, activations=activations, max_context=max_context)
    flat = torch.from_numpy(np.fromfile(FOLDER / "stories260K.bin", dtype="<f4", offset=28))
    position = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal position
        count = int(np.prod(shape))
        found = flat[position : position + count].view(shape)
        position += count
        return found

    def fill(name: str, rows_RC: torch.Tensor, start: int = 0) -> None:
        fill_rtn(model.get_submodule(name), start, rows_RC.clone(), name=name)  # type: ignore[arg-type]

    mixer, ffn, L, D = spec.layers[0].mixer, spec.layers[0].ffn, spec.L, spec.D
    assert isinstance(mixer, Attention) and isinstance(ffn, DenseFFN)
    query_rows, key_rows = mixer.N * mixer.H, mixer.K * mixer.H
    fill("embed", take(spec.V, D))
    qkv, gate_up = "attn.qkv", "ffn.gate_up"
    parts = [
        ("attn_norm", 0, (D,)), (qkv, 0, (query_rows, D)), (qkv, query_rows, (key_rows, D)), (qkv, query_rows + key_rows, (key_rows, D)),
        ("attn.out", 0, (D, query_rows)), ("ffn_norm", 0, (D,)), (gate_up, 0, (ffn.F, D)), ("ffn.down", 0, (D, ffn.F)), (gate_up, ffn.F, (ffn.F, D)),
    ]  # fmt: skip
    for name, start, shape in parts:
        for layer, values in enumerate(take(L, *shape)):
            if len(shape) == 1:
                model.get_submodule(f"layers.{layer}.{name}").weight.data.copy_(values)  # type: ignore[union-attr]
            else:
                fill(f"layers.{layer}.{name}", values, start)
    assert model.final_norm is not None
    model.final_norm.weight.data.copy_(take(D))
    return model


def stories_tokens() -> list[bytes]:
    """The bytes of each of the 512 tokens: in tok512.bin a score (fp32), a length (int32) and the bytes, after one int32."""
    data, position, found = (FOLDER / "tok512.bin").read_bytes(), 4, []
    while position < len(data):
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        found.append(data[position + 8 : position + 8 + length])
        position += 8 + length
    return found


def decode(tokens: list[int]) -> str:
    """Text of tokens that follow BOS: the first one's leading space goes, `<0x0A>` and its like are bytes."""
    pieces = stories_tokens()
    text = b""
    for token in tokens:
        piece = pieces[token]
        text += bytes([int(piece[3:5], 16)]) if piece.startswith(b"<0x") and piece.endswith(b">") else piece
    return text.decode(errors="replace").removeprefix(" ")
