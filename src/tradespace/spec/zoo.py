"""Published models by name, so that a plan needs neither weights nor a network. The numbers are `zoo_table.py`; each line becomes a config.json's keys."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from typing import Any

from tradespace.errors import InputError
from tradespace.spec.families import model_spec_from_config
from tradespace.spec.model import ModelSpec
from tradespace.spec.zoo_table import SHORT, TABLE


@dataclass(frozen=True, kw_only=True)
class ZooEntry:
    """A published model: its name here, the config that its line stands for, and the published total of parameters (None where none is published exactly)."""

    name: str
    config: dict[str, Any]
    published_parameters: int | None = None
    plan_only: str | None = None


_HEAD = re.compile(r"\[(?P<family>[\w.-]+)(?P<nested> in text_config)?\] (?P<columns>.+)")
# sizes that a family's published configs state and a table line need not repeat
_IMPLIED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"num_key_value_heads": 128},
    "nemotron_h": {"num_hidden_layers": None, "vocab_size": 131_072},
    "phi3": {"num_key_value_heads": 32},
}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _entries() -> Iterator[ZooEntry]:
    family, nested, columns = "", False, []
    text = re.sub(r",\\\n\s+", ",", TABLE)
    text = re.sub(r"\\\n\s+", " ", text)
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        head = _HEAD.fullmatch(line)
        if head:
            family, nested, columns = head["family"], bool(head["nested"]), head["columns"].split()
            continue
        name, *words = line.split()
        published = words[len(columns)]
        more = [word.partition("=") for word in words[len(columns) + 1 :]]
        pairs = [*zip(columns, words, strict=False), *((key, word) for key, _, word in more)]
        values = {SHORT.get(key, key): _value(word) for key, word in pairs}
        reason = values.pop("plan_only", None)
        if "blocks" in values:
            values["block_configs"] = _blocks(values.pop("blocks"))
        yield ZooEntry(
            name=name,
            config=_config(family, nested, values),
            published_parameters=None if published == "-" else int(published),
            plan_only=None if reason is None else reason.replace("_", " "),
        )


def _config(family: str, nested: bool, values: dict[str, Any]) -> dict[str, Any]:
    values = {key: value for key, value in (_IMPLIED.get(family, {}) | values).items() if value is not None or key == "sliding_window"}
    if not nested:
        return {"model_type": family, **values}
    tied = values.pop("tie_word_embeddings", family == "gemma4")
    return {"model_type": family, "tie_word_embeddings": tied, "text_config": values, "vision_config": {}}


def _blocks(text: str) -> list[dict[str, Any]]:
    """`8:5.25×5` is five blocks with groups of 8 query heads and a feed-forward multiplier of 5.25; `-` in front is a block without attention."""
    found: list[dict[str, Any]] = []
    for run in text.split(","):
        block, _, count = run.partition("×")
        group, multiplier = block.split(":")
        attention = {"no_op": True} if group == "-" else {"n_heads_in_group": int(group)}
        found += [{"attention": attention, "ffn": {"ffn_mult": float(multiplier)}}] * int(count or 1)
    return found


ZOO: dict[str, ZooEntry] = {entry.name: entry for entry in _entries()}
PUBLISHED_PARAMETERS: dict[str, int] = {entry.name: entry.published_parameters for entry in ZOO.values() if entry.published_parameters is not None}

# other names that people use; a plain family name means the size that its paper is known for
ALIASES: dict[str, str] = {
    "gpt2-124m": "gpt2", "gpt2-small": "gpt2", "gpt-3": "gpt-3-175b", "gpt3": "gpt-3-175b", "bloom": "bloom-176b", "bloom-175b": "bloom-176b",
    "llama-1-7b": "llama-7b", "llama-1-13b": "llama-13b", "llama-1-30b": "llama-30b", "llama-1-65b": "llama-65b", "llama-33b": "llama-30b",
    "mistral-7b": "mistral-7b-v0.1", "mixtral-8x7b-v0.1": "mixtral-8x7b", "mixtral-8x22b-v0.1": "mixtral-8x22b", "mistral-nemo-2407": "mistral-nemo-12b",
    "phi-3-mini": "phi-3-mini-4k", "phi-3-medium": "phi-3-medium-4k", "starcoderbase": "starcoder", "smollm3": "smollm3-3b",
    "llama-3_3-nemotron-super-49b-v1": "llama-3.3-nemotron-super-49b",
}  # fmt: skip
# endings of repository names that change no number
_ENDINGS = {"hf", "instruct", "it", "chat", "base", "pt", "fp8", "nvfp4", "bf16", "thinking", "preview", "2407"}
_PREFIXES = ("meta-", "nvidia-")


def zoo_names() -> tuple[str, ...]:
    """Every name in the zoo, in the table's order: by family, then size."""
    return tuple(ZOO)


def _key(name: str) -> str:
    """`meta-llama/Llama-2-70b-hf` and `llama2-70b` are one key: the last part, without endings that change nothing, letters, digits and dots only."""
    words = name.strip().lower().rsplit("/", 1)[-1].replace("_", "-")
    for prefix in _PREFIXES:
        words = words.removeprefix(prefix)
    parts = words.split("-")
    while len(parts) > 1 and parts[-1] in _ENDINGS:
        parts.pop()
    return re.sub(r"[^a-z0-9.]", "", "".join(parts))


@cache
def _keys() -> dict[str, str]:
    keys = {_key(alias): name for alias, name in ALIASES.items()}
    return keys | {_key(name): name for name in ZOO}


@cache
def _spec(name: str) -> ModelSpec:
    entry = ZOO[name]
    model = model_spec_from_config(entry.config, name)
    return model if entry.plan_only is None else replace(model, plan_only=entry.plan_only)


def find_model(name: str) -> ModelSpec:
    """The zoo's model of that name: "llama-2-70b", "Llama-2-70B" or a repository's "meta-llama/Llama-2-70b-hf".

    Raises InputError with the closest names where there is none.

    >>> find_model("meta-llama/Llama-2-70b-hf").name
    'llama-2-70b'
    """
    found = _keys().get(_key(name)) if len(name) <= 200 else None
    if found is not None:
        return _spec(found)
    close = get_close_matches(_key(name[:200]), _keys(), n=3, cutoff=0.6)
    hint = f"Did you mean {', '.join(dict.fromkeys(_keys()[key] for key in close))}? " if close else "`tradespace models` lists the names. "
    raise InputError(f"no model '{name[:100]}' in the zoo. {hint}A folder with config.json, a GGUF file or a repository's id on the hub works too")
