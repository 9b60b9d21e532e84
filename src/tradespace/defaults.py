"""How a model wants to be sampled where the caller does not say: its generation_config.json, or the metadata of its GGUF file."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tradespace.loading.gguf import read_gguf
from tradespace.loading.resolve import ModelFiles


@dataclass(frozen=True)
class Defaults:
    """What the model's own generation_config (or GGUF metadata) asks for; a caller's value always wins. Without one: greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, files: ModelFiles) -> Defaults:
        if files.kind == "gguf":
            metadata = read_gguf(files.weights[0]).metadata
            stated = {name: metadata.get(f"general.sampling.{key}") for name, key in (("temperature", "temp"), ("top_k", "top_k"), ("top_p", "top_p"))}
        else:
            stated = dict(files.generation_config or {})
            if not stated.get("do_sample", False):  # as transformers reads it: without do_sample the rest does not apply
                stated = {name: value for name, value in stated.items() if name == "repetition_penalty"}
            elif stated.get("temperature") is None:
                stated["temperature"] = 1.0
        found = cls()
        for name, value in stated.items():
            if name in cls.__dataclass_fields__ and isinstance(value, int | float) and not isinstance(value, bool):
                found = replace(found, **{name: type(getattr(found, name))(value)})
        return found
