"""config.json → ModelSpec, one file per group of families, one table of names.

A family is a function from a `ConfigReader` to a `ModelSpec`; it reads every key that matters, and what nobody read is refused. Adding a family: write that
function, enter it in FAMILIES, and tests compare its parameter count with transformers' on random configs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from tradespace.errors import InputError, UnsupportedError
from tradespace.spec.families import falcon, gemma, gpt, llama, phi
from tradespace.spec.families.reader import ConfigReader, shown
from tradespace.spec.model import ModelSpec

Family = Callable[[ConfigReader], ModelSpec]

RUNNABLE: dict[str, Family] = {
    "llama": llama.llama,
    "mistral": llama.mistral,
    "qwen2": llama.qwen2,
    "qwen3": llama.qwen3,
    "smollm3": llama.smollm3,
    "gemma2": gemma.gemma2,
    "gemma3_text": gemma.gemma3_text,
    "gemma3": gemma.gemma3,
    "phi3": phi.phi3,
    "falcon": falcon.falcon,
    "gpt_bigcode": gpt.gpt_bigcode,
    "gpt2": gpt.gpt2,
}
PLAN_ONLY: dict[str, Family] = {
    "opt": gpt.opt,
    "bloom": gpt.bloom,
}
FAMILIES: dict[str, Family] = RUNNABLE | PLAN_ONLY

# Known by name, and known to hold a mechanism that no spec prices: refused with that reason rather than guessed.
REFUSED: dict[str, str] = {}


def model_spec_from_config(config: Mapping[str, Any], name: str) -> ModelSpec:
    """The ModelSpec of a Hugging Face config.json, read as a dictionary.

    Raises InputError where a field is missing, ill-typed or beyond sense, UnsupportedError where the family, or a field that could change results, is not
    understood; both name the field. The work done is bounded whatever the dictionary says.
    """
    if not isinstance(config, Mapping):
        raise InputError(f"{name}: config.json must hold a dictionary; it holds {type(config).__name__}")
    family = config.get("model_type")
    if not isinstance(family, str) or not family:
        raise InputError(f"{name}: config.json has no 'model_type'; it is {shown(family)}. Known: {', '.join(FAMILIES)}")
    if family in REFUSED:
        raise UnsupportedError(f"{name}: model_type '{family}' cannot be planned: {REFUSED[family]}")
    if family not in FAMILIES:
        close = get_close_matches(family[:64], FAMILIES, n=3, cutoff=0.5)
        hint = f"Closest known: {', '.join(close)}" if close else f"Known: {', '.join(FAMILIES)}"
        raise UnsupportedError(f"{name}: unknown model_type {shown(family)}. {hint}")
    reader = ConfigReader(config, name=name, family=family)
    reader.raw("model_type")
    return FAMILIES[family](reader)
