"""The peak of quantizing, measured from outside, lies below what was stated, and that below the bf16 model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cli.tiny_model import make_home, make_tokenizer
from tradespace.units import MiB

SOURCE = Path(__file__).resolve().parents[2] / "src"
D, F, LAYERS, V, HEADS = 768, 2048, 4, 300_000, 12
BUDGET = 440 * MiB
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS, "head_dim": D // HEADS,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": V, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "hidden_act": "silu",
}  # fmt: skip

_COMMAND = """
import json, sys, tradespace as ts
found = ts.quantize(sys.argv[1], sys.argv[2], format="int4-g128", method=sys.argv[4], calibrate=sys.argv[3], samples=2, context=128, memory=int(sys.argv[5]))
print(json.dumps({"peak": found.peak_bytes, "bf16": found.bf16_bytes, "weights": found.weight_bytes}))
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of half a GiB in bf16, a shard a layer."""
    folder = tmp_path_factory.mktemp("big") / "model"
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    weight_map = {}

    def save(number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        made = {name: (torch.randn(shape, generator=draw) * 0.02 + (len(shape) == 1)).bfloat16() for name, shape in shapes.items()}
        save_file(made, folder / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(made, f"model-{number:05d}.safetensors"))

    save(0, {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)})
    for layer in range(LAYERS):
        attention = {f"self_attn.{part}_proj.weight": (D, D) for part in "qkvo"}
        ffn = {"mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D), "mlp.down_proj.weight": (D, F)}
        norms = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
        save(layer + 1, {f"model.layers.{layer}.{name}": shape for name, shape in {**attention, **ffn, **norms}.items()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    make_tokenizer().save(str(folder / "tokenizer.json"))
    make_home(folder.parent / "home")
    (folder.parent / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 300)
    return folder


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="proportional memory is measured on Linux")
@pytest.mark.parametrize("method", ["rtn-search", "gptq"])
def test_the_peak_lies_below_the_budget_and_that_below_the_model(method: str, big: Path, tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "TRADESPACE_HOME": str(big.parent / "home"), "OMP_NUM_THREADS": "2"}
    arguments = [sys.executable, "-c", _COMMAND, str(big), str(tmp_path / "out"), str(big.parent / "text.txt"), method, str(BUDGET)]
    ran = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["peak"] <= BUDGET < found["bf16"]
    assert found["weights"] < found["bf16"]
