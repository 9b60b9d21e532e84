"""No field of a quantization_config is ever ignored in silence: whatever one is changed to, either it is refused by name, or the plan changes with it, or it is
one that says nothing about what the codes mean.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loading.quantized_models import linear_modules, tiny_config, tiny_model
from tradespace.errors import UnsupportedError
from tradespace.loading.compressed_tensors import quantization_config
from tradespace.loading.quantized import read_convention, stored_formats
from tradespace.spec.families import model_spec_from_config

MODULES = tuple(linear_modules(tiny_model(tiny_config())))
VALID: dict[str, dict[str, Any]] = {
    "pack-quantized": quantization_config(dict.fromkeys(MODULES, "int4-g64-zp")),
    "float-quantized": quantization_config(dict.fromkeys(MODULES, "fp8-block")),
    "int-quantized": quantization_config(dict.fromkeys(MODULES, "w8a8")),
    "mixture": quantization_config({name: "int8" if "mlp" in name else "int3-g32" for name in MODULES}),
    "folded": quantization_config({name: "int2-g64-zp" if "mlp" in name else "fp8" for name in MODULES}),
    "tradespace": quantization_config({name: "nf4" if "mlp" in name else "int3-g32" for name in MODULES}),
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True, "checkpoint_format": "gptq", "lm_head": False,
             "dynamic": None},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm", "modules_to_not_convert": ["o_proj"]},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
                     "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": ["lm_head"]},
    "fp8": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "scale_fmt": "float"},
}  # fmt: skip
# what says nothing about the meaning of codes; and what may be absent, since its default is what stands there
INERT = {"version", "global_compression_ratio", "ignore", "dequantize"}
SKIPS = {"llm_int8_skip_modules", "modules_to_not_convert"}  # which may name modules that are not there
STRANGE: list[Any] = [None, True, False, 0, 1, 7, -1, 2**70, 3.5, float("nan"), "", "x", "int8", [], ["x"], {}, {"x": 1}, [[]]]


def _paths(value: Any, path: tuple = ()) -> list[tuple]:
    """Every place in a config: fields, and whole sections, too."""
    found = [path] if path else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += _paths(inner, (*path, key))
    return found


def _changed(config: dict[str, Any], path: tuple, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return config


def _meaning(quantization: dict[str, Any]) -> Any:
    """Everything that follows from a config without its files: the plan, and how each module is stored."""
    config = tiny_config().to_dict() | {"quantization_config": quantization}
    spec = model_spec_from_config(config, "tiny")
    convention = read_convention(config, spec)
    inner = {key: value for key, value in vars(convention).items() if isinstance(value, int | str | dict | tuple) and key != "together"}
    return stored_formats(config, spec), inner, convention.notes


_PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(_PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=5)
PLACES = [(name, path) for name, config in VALID.items() for path in _paths(config)]


@pytest.mark.parametrize("name", VALID)
def test_they_are_valid(name):
    _meaning(VALID[name])


@pytest.mark.parametrize(("name", "path"), PLACES, ids=lambda part: part if isinstance(part, str) else ".".join(part))
def test_every_place_with_every_strange_value(name, path):
    usual = _meaning(VALID[name])
    for value in STRANGE:
        changed = _changed(VALID[name], path, value)
        if repr(changed) == repr(VALID[name]):
            continue
        _check(name, path, value, changed, usual)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(PLACES), JSON)
def test_any_value_in_any_place(place, value):
    name, path = place
    changed = _changed(VALID[name], path, value)
    if repr(changed) != repr(VALID[name]):
        _check(name, path, value, changed, _meaning(VALID[name]))


def _check(name: str, path: tuple, value: Any, changed: dict[str, Any], usual: Any) -> None:
    try:
        found = _meaning(changed)
    except UnsupportedError as error:
        if not any(str(key) in str(error) for key in path):
            raise AssertionError(f"{path} = {value!r}: {error}") from error
        return
    if path[-1] in INERT or (path[-1] in SKIPS and isinstance(value, list)):
        return
    # null, and an empty list or dictionary where one is meant, is an absent field; and -1 is how some write a group that is the whole row
    absent = value in (None, [], {}) or (path[-1] == "group_size" and value == -1)
    same = repr(found) == repr(usual)
    assert not same or (absent and _meaning_without(name, path) == repr(found)), f"{path} = {value!r} changes nothing and is not refused"


def _meaning_without(name: str, path: tuple) -> str:
    config = copy.deepcopy(VALID[name])
    place = config
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return repr(_meaning(config))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([place for place in PLACES if len(place[1]) < 4]), st.text(min_size=1, max_size=12))
def test_a_field_that_nobody_knows_is_named(place, key):
    name, path = place
    section = VALID[name]
    for step in path[:-1]:
        section = section[step]
    known = {"observer", "observer_kwargs", "run_compressed", "dequantize", *section}
    if key in known or (path[:1] in (("config_groups",), ("formats",)) and len(path) < 3):
        return
    changed = _changed(VALID[name], (*path[:-1], key), 12345)
    with pytest.raises(UnsupportedError) as caught:
        _meaning(changed)
    assert key in str(caught.value) or repr(key) in str(caught.value)


def test_dequantize_contradicts_quantized_activations():
    with pytest.raises(UnsupportedError, match=r"quantization_config.dequantize = True: it leaves out what input_activations ask for"):
        _meaning(VALID["int-quantized"] | {"dequantize": True})


def test_methods_that_are_not_read_are_named():
    for method in ("aqlm", "modelopt", "hqq", None, 3):
        words = "is missing" if method is None else rf"= {method!r} is not read here"
        with pytest.raises(UnsupportedError, match=rf"quantization_config.quant_method {words}\. Read: .*gptq"):
            _meaning({"quant_method": method})


@pytest.mark.parametrize("pattern", ["re:(a+)+$", "re:(.*)*x", "re:[", "re:(?=a)", "re:" + "a" * 2000])
def test_patterns_that_could_run_for_ever_are_refused(pattern):
    config = VALID["pack-quantized"] | {"ignore": [pattern]}
    with pytest.raises(UnsupportedError, match="ignore"):
        _meaning(config)


def test_a_name_wins_over_a_pattern_and_a_pattern_over_the_class():
    groups = quantization_config({"a": "int8", "b": "int4-g64", "c": "int3-g32"})["config_groups"]
    for group, targets in zip(groups.values(), (["Linear"], [r"re:model\.layers\.\d+\.mlp\..*"], ["model.layers.1.mlp.down_proj"]), strict=True):
        group["targets"] = targets
    config = tiny_config().to_dict()
    spec = model_spec_from_config(config, "tiny")
    quantization = VALID["mixture"] | {"config_groups": groups, "ignore": [r"re:.*lm_head", "model.layers.0.self_attn.o_proj"]}
    convention = read_convention(config | {"quantization_config": quantization}, spec)
    found = {name: convention.format_of(name, whole=[name]) for name in (*MODULES, "lm_head", "model.embed_tokens")}
    assert found["model.layers.1.mlp.down_proj"] == "int3-g32"
    assert found["model.layers.0.mlp.down_proj"] == found["model.layers.1.mlp.up_proj"] == "int4-g64"
    assert found["model.layers.1.self_attn.o_proj"] == "int8"
    assert found["lm_head"] is found["model.embed_tokens"] is found["model.layers.0.self_attn.o_proj"] is None
