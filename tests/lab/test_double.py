"""The float64 pass that fp32 paths are measured against: transformers' numbers, and nearer to them in float64 than fp32 comes."""

from __future__ import annotations

import pytest
import torch

from model.family_configs import CONTEXT, V
from model.family_models import make_pair, packed_logits
from tradespace.errors import UnsupportedError
from tradespace.lab.double import double_logits
from tradespace.spec.weights import WeightPlan


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_logits_are_transformers(family, seed, tmp_path):
    """Windows, ties, biases, norms of heads, either order of rotary pairs. transformers' norms stay in fp32: that is what is left between the two."""
    pair = make_pair(family, seed, tmp_path)
    tokens_T = torch.randint(0, V, (40,), generator=torch.Generator().manual_seed(seed))
    model = pair.ours(max_context=CONTEXT)
    found = torch.cat(list(double_logits(model, tokens_T.tolist(), rows=7)))
    with torch.inference_mode():
        expected = pair.oracle.double()(tokens_T[None]).logits[0]
    scale = expected.std()
    assert found.dtype == torch.float64 and scale > 0.05
    assert (found - expected).abs().max() < 1e-5 * scale
    assert 0 < (packed_logits(model, [tokens_T])[0].double() - found).abs().max() < 1e-4


def test_other_models_are_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="RMS norms, rotary positions"):
        list(double_logits(make_pair("gpt2", 0, tmp_path / "gpt2").ours(max_context=16), [1, 2], rows=2))
    coded = make_pair("llama", 0, tmp_path / "llama").ours(max_context=16, plan=WeightPlan(default="bf16"))
    with pytest.raises(UnsupportedError, match="reads weights in fp32"):
        list(double_logits(coded, [1, 2], rows=2))
