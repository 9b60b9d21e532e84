"""Every config in the shared folder plans, with the parameter total of its model card within 0.5%, or is refused by name with a reason."""

import json
from pathlib import Path

import pytest

from tradespace.errors import InputError
from tradespace.spec.families import model_spec_from_config
from tradespace.spec.tensors import num_parameters

FOLDER = Path(__file__).parents[3] / "shared" / "data" / "model-configs"
FILES = sorted(path.name for path in FOLDER.glob("*.json")) if FOLDER.is_dir() else []

# billions of parameters of the decoder, from model cards (language model only), by a piece of the file's name
TOTALS = {
    "MiniMax-M2": 228.7, "Qwen3-0.6B": 0.596, "Qwen3-1.7B": 1.7206, "Qwen3-8B": 8.19, "Qwen3-32B": 32.76, "Qwen3-235B": 235.1, "Qwen3-30B": 30.53,
    "Qwen3-Coder-480B": 480.2, "Qwen3.5-122B": 122.1, "Qwen3.5-27B": 26.9, "Qwen3.5-35B": 34.7, "Qwen3.5-397B": 396.3, "MiMo-V2-Flash": 309.0,
    "DeepSeek-R1": 671.0, "DeepSeek-V3_": 671.0, "DeepSeek-V3.1": 671.0, "DeepSeek-V3.2": 671.9, "Meta-Llama-3.1-405B": 405.85, "Meta-Llama-3.1-70B": 70.55,
    "Meta-Llama-3.1-8B": 8.03, "Mixtral-8x22B": 140.62, "Mixtral-8x7B-v": 46.7, "Kimi-K2": 1026.4, "GLM-5_": 744.0, "Nemotron-Super-49B": 49.9,
    "Nano-30B": 31.6, "Super-120B": 120.6, "Ultra-550B": 550.0, "Nemotron-H-56B": 56.3, "gpt-oss-120b": 116.83, "gpt-oss-20b": 20.91,
    "Llama-4-Scout": 107.77, "Llama-4-Maverick": 400.7, "gemma-4-26B": 25.2, "Gemma-4-31B": 30.7,
}  # fmt: skip
REFUSED = {
    "MiniMax-M3": "block-sparse", "DeepSeek-V4": "compressed attention", "Kimi-K3": "residual attention", "Step-3.7": "sliding layers",
    "bloom-175b": "model_type", "facebook_opt": "model_type", "gpt2": "n_embd",
}  # fmt: skip


@pytest.mark.skipif(not FILES, reason="no shared/data/model-configs beside the repository")
@pytest.mark.parametrize("file", FILES)
def test_plans_or_is_refused_by_name(file):
    config = json.loads((FOLDER / file).read_text())
    reason = next((why for piece, why in REFUSED.items() if piece in file), None)
    if reason is not None:
        with pytest.raises(InputError, match=reason):
            model_spec_from_config(config, file)
        return
    model = model_spec_from_config(config, file)
    for piece, billions in TOTALS.items():
        if piece in file and "VL" not in file:
            assert num_parameters(model) / 1e9 == pytest.approx(billions, rel=5e-3)
    assert model.L >= 1 and model.max_context >= 2048
