"""Folds and rotations change nothing but the basis: fp32 outputs of random models stay as they were. And sources give every family's tensors right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cli.tiny_model import save_folder, save_gguf
from model.family_models import make_pair, packed_logits
from quantize.models import CONTEXT, Tensors, embedded, logits, stored, through
from tradespace.api import spec_of_files
from tradespace.errors import UnsupportedError
from tradespace.loading.gguf import read_gguf
from tradespace.loading.resolve import resolve
from tradespace.loading.safetensors import read_sharded
from tradespace.quantize.folds import apply_fold, layer_folds, norm_rounding, shared_scales
from tradespace.quantize.hadamard import RotatedWeights, random_rotation
from tradespace.quantize.source import StoredWeights

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "falcon", "gpt2")  # every arrangement, norm and fold
TOLERANCE = 1e-4


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("family", FAMILIES[:-1])  # gpt2 adds positions, which `embedded` leaves out
def test_layers_from_a_source_are_the_models_own(family: str, tmp_path: Path):
    pair = make_pair(family, 0, tmp_path)
    weights = StoredWeights(read_sharded(tmp_path), pair.spec)
    tokens = torch.randint(0, pair.spec.V, (CONTEXT,), generator=torch.Generator().manual_seed(3))
    wanted = packed_logits(pair.ours(max_context=CONTEXT), [tokens])[0]
    found = logits(weights, through(weights, embedded(weights)))
    if pair.spec.logit_softcap is not None:
        found = (found / pair.spec.logit_softcap).tanh() * pair.spec.logit_softcap
    assert relative(found, wanted) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_folds_leave_the_outputs(family: str, dtype: torch.dtype, tmp_path: Path):
    weights = stored(family, tmp_path)
    kinds: set[str] = set()

    def fold(index: int, tensors: Tensors) -> Tensors:
        layer, prefix = weights.spec.layers[index], f"layers.{index}."
        own = {name: values.clone() for name, values in tensors.items()}
        draw = torch.Generator().manual_seed(index)
        for found in layer_folds(layer):
            kinds.add(found.kind)
            width = own[f"{prefix}{found.linears[0]}.weight"].shape[1]
            scale = shared_scales(found, layer, torch.rand(width, generator=draw) * 3 + 0.3)
            rounding = norm_rounding(dtype, added=1.0 if weights.spec.norm_plus_one else 0.0)
            used = apply_fold(own, prefix, found, layer, scale, round_norm=rounding)
            if found.kind == "norm":
                kept = own[f"{prefix}{found.feeder}.weight"]
                assert torch.equal(rounding(kept), kept), "a folded norm is stored without loss"
                assert not torch.equal(used, torch.ones_like(used))
        assert any(not torch.equal(own[name], tensors[name]) for name in own)
        return own

    hidden = embedded(weights)
    assert relative(through(weights, hidden, fold), through(weights, hidden)) < TOLERANCE
    assert kinds == ({"norm", "value"} if family in ("falcon", "gpt2") else {"norm", "value", "up"})


@pytest.mark.parametrize("width", [1, 2, 7, 12, 20, 28, 36, 48, 64, 92, 100, 576])
def test_rotations_are_orthogonal_and_even(width: int):
    turn = random_rotation(width, 5)
    torch.testing.assert_close(turn @ turn.T, torch.eye(width), rtol=0, atol=1e-5)
    if width not in (7, 92, 100):  # those have an odd part without a Hadamard matrix of Paley's
        torch.testing.assert_close(turn.abs(), torch.full_like(turn, width**-0.5), rtol=1e-4, atol=0)
    assert width < 7 or not torch.equal(turn, random_rotation(width, 6))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_rotated_model_gives_the_same_logits(family: str, seed: int, tmp_path: Path):
    weights = stored(family, tmp_path, seed)
    turned = RotatedWeights(weights, seed=9)
    assert not turned.spec.tied
    wanted = logits(weights, through(weights, embedded(weights)))
    found = logits(turned, through(turned, embedded(turned)))
    assert relative(found, wanted) < TOLERANCE
    before, after = weights.read("layers.0.ffn.down.weight"), turned.read("layers.0.ffn.down.weight")
    assert relative(after, before) > 0.1


@pytest.mark.parametrize(("family", "why"), [("gemma3_text", "weigh their outputs"), ("falcon", "subtract the mean"), ("gpt2", "subtract the mean")])
def test_what_cannot_be_rotated_is_refused(family: str, why: str, tmp_path: Path):
    with pytest.raises(UnsupportedError, match=why):
        RotatedWeights(stored(family, tmp_path), seed=0)


def test_a_gguf_file_is_read_in_the_order_of_halves(tmp_path: Path):
    folder, file = resolve(str(save_folder(tmp_path / "hub"))), resolve(str(save_gguf(tmp_path / "tiny.gguf")))
    ours = StoredWeights(read_sharded(folder.folder), spec_of_files(folder))
    theirs = StoredWeights(read_gguf(file.weights[0]), spec_of_files(file))
    for name in ("layers.0.attn.qkv.weight", "layers.1.ffn.gate_up.weight", "layers.1.attn_norm.weight"):
        assert torch.equal(ours.read(name), theirs.read(name))
    assert spec_of_files(file).layers[0].mixer.rope.interleaved and not theirs.spec.layers[0].mixer.rope.interleaved
