"""The published configs of the shared folder against transformers, built at their full size on the meta device: parameters to the last one, and what its cache
holds for one more token and for a sequence. Nothing is stored, so a trillion parameters take a second.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tradespace.errors import InputError
from tradespace.spec.families import model_spec_from_config
from tradespace.spec.kv import token_bytes
from tradespace.spec.mixers_latent import LatentAttention
from tradespace.spec.model import ModelSpec, RoutedFFN
from tradespace.spec.tensors import model_tensors, num_parameters

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

FOLDER = Path(__file__).parents[3] / "shared" / "data" / "model-configs"
# classes of the same mathematics, for names that transformers has no class of its own for
SAME_AS = {"kimi_k2": "deepseek_v3", "qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe", "mimo": "qwen2"}
STORAGE = ("quantization_config", "compression_config", "auto_map", "transformers_version", "name", "_name_or_path", "torch_dtype", "dtype")
LISTED = {"gemma4": 341_760, "gemma4_text": 341_760}  # scales of experts and routers that our list of tensors names in extra_parameters instead


def _configs() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """One file for each architecture: (the config as published, the decoder's part without what is about storage)."""
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for path in sorted(FOLDER.glob("*.json")) if FOLDER.is_dir() else []:
        config = json.loads(path.read_text())
        if "model_type" not in config or "hidden_dim" in config:  # short sheets are nothing that transformers reads
            continue
        decoder = {key: value for key, value in config.get("text_config", config).items() if key not in STORAGE}
        kind = decoder.get("model_type", config["model_type"])
        decoder["model_type"] = SAME_AS.get(kind, kind)
        if decoder["model_type"] in CONFIG_MAPPING:
            sizes = json.dumps({key: value for key, value in decoder.items() if isinstance(value, int | list) and "token" not in key}, sort_keys=True)
            found.setdefault(f"{decoder['model_type']} {sizes}", (config | {"_file": path.name}, decoder))
    return {config.pop("_file"): (config, decoder) for config, decoder in found.values()}


CONFIGS = _configs()


def _ours(file: str) -> ModelSpec | None:
    try:
        return model_spec_from_config(CONFIGS[file][0], file)
    except InputError:  # refused by name: tests/unit/test_config_published.py says which
        return None


PLANNED = [file for file in CONFIGS if _ours(file) is not None]


def _theirs(file: str) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**CONFIGS[file][1]), dtype=torch.bfloat16).eval()


@pytest.mark.skipif(not PLANNED, reason="no shared/data/model-configs beside the repository")
@pytest.mark.parametrize("file", PLANNED)
def test_parameters_to_the_last_one(file):
    ours = _ours(file)
    assert ours is not None
    counted = num_parameters(ours) - sum(tensor.num_elements for tensor in model_tensors(ours) if tensor.name.endswith("score_bias"))
    if any(isinstance(layer.ffn, RoutedFFN) for layer in ours.layers):
        counted += LISTED.get(ours.family, 0)
    assert sum(parameter.numel() for parameter in _theirs(file).parameters()) == counted


def _largest_of_each_family() -> list[str]:
    largest: dict[str, str] = {}
    for file in PLANNED:
        family, model = CONFIGS[file][1]["model_type"], _ours(file)
        assert model is not None
        rival = _ours(largest[family]) if family in largest else None
        if rival is None or model.L * model.D > rival.L * rival.D:
            largest[family] = file
    return list(largest.values())


def _held(cache: Any) -> tuple[int, int]:
    """(bytes of keys, values and latents; bytes of states) of a transformers cache."""

    def nbytes(layer: Any, *names: str) -> int:
        held = [getattr(layer, name, None) for name in names]
        flat = [part for value in held for part in (value.values() if isinstance(value, dict) else (value,))]
        return sum(part.numel() * part.element_size() for part in flat if part is not None and torch.is_tensor(part))

    return sum(nbytes(layer, "keys", "values") for layer in cache.layers), sum(nbytes(layer, "conv_states", "recurrent_states") for layer in cache.layers)


@pytest.mark.skipif(not PLANNED, reason="no shared/data/model-configs beside the repository")
@pytest.mark.parametrize("file", _largest_of_each_family())
def test_cache_of_a_token_and_states_of_a_sequence(file):
    """transformers keeps one column more of a convolution's inputs than the next token needs, and no keys of a sparse index."""
    ours = _ours(file)
    assert ours is not None
    model = _theirs(file)
    with torch.no_grad():
        (short, _), (long, states) = (
            _held(model(torch.zeros(1, length, dtype=torch.long, device="meta"), use_cache=True).past_key_values) for length in (2, 3)
        )
    mixers = [layer.mixer for layer in ours.layers if layer.mixer is not None]
    index = sum(2 * mixer.index.H for mixer in mixers if isinstance(mixer, LatentAttention) and mixer.index is not None)
    assert token_bytes(ours, "bf16") == long - short + index
    column = sum(2 * tensor.shape[0] for tensor in model_tensors(ours) if tensor.name.endswith("conv.weight"))
    assert sum(mixer.state_bytes_per_sequence for mixer in mixers) == states - (column if states else 0)
