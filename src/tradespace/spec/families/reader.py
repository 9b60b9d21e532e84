"""A config.json read to the letter: every key is typed, bounded, and either understood, known to be harmless, or an error that names it.

A key whose value is null counts as absent, as published configs write it. What is left unread at the end and is not on a list of harmless keys could
change the mathematics, so it is refused rather than dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any

from tradespace.errors import InputError, UnsupportedError

MAX_LAYERS, MAX_WIDTH, MAX_VOCAB, MAX_HEADS, MAX_CONTEXT, MAX_EXPERTS = 4096, 2**22, 2**26, 2**16, 2**32, 2**16

# Keys that change nothing at inference: names, storage, training, classification heads, defaults of generation, and how somebody else's code runs.
_HARMLESS_KEYS = """
model_type architectures auto_map _name_or_path name_or_path transformers_version model_max_length tokenizer_class prefix finetuning_task task_specific_params
_commit_hash _attn_implementation attn_implementation _attn_implementation_autoset use_flash_attn
bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id unk_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id eos_token
initializer_range initializer_factor init_std embd_pdrop resid_pdrop attn_pdrop attention_dropout hidden_dropout dropout classifier_dropout layerdrop
embedding_dropout resid_dropout output_router_logits router_aux_loss_coef aux_loss_alpha seq_aux router_jitter_noise problem_type id2label label2id num_labels
use_cache output_attentions output_hidden_states output_scores return_dict return_dict_in_generate torchscript tf_legacy_loss use_bfloat16 is_decoder
tie_encoder_decoder gradient_checkpointing pretraining_tp chunk_size_feed_forward max_length min_length do_sample early_stopping num_beams num_beam_groups
diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
num_return_sequences exponential_decay_length_penalty suppress_tokens begin_suppress_tokens remove_invalid_values ep_size num_logits_to_keep
cache_implementation unsloth_version unsloth_fixed is_llama_config neftune_noise_alpha
"""
HARMLESS = frozenset(_HARMLESS_KEYS.split())
# Heads for another purpose than the next token: the decoder under them is the same, what comes out is not.
_OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice", "ForReward", "RewardModel")
_MISSING: Any = object()


def shown(value: object) -> str:
    """A value for a message, cut where a hostile file would fill the screen."""
    text = repr(value) if not isinstance(value, (dict, list)) or len(value) < 64 else f"{type(value).__name__} of {len(value)} entries"
    return text if len(text) <= 120 else text[:117] + "…"


class ConfigReader:
    """Typed reads of one config dictionary. `path` is where it sits ("text_config." in a nested one), `family` its model_type."""

    def __init__(self, values: Mapping[str, Any], *, name: str, family: str, path: str = ""):
        self.values, self.name, self.family, self.path = values, name, family, path
        self._read: set[str] = set()
        self._nested: list[tuple[ConfigReader, Iterable[str]]] = []

    def wrong(self, key: str, why: str) -> InputError:
        return InputError(f"{self.name}: config field '{self.path}{key}' {why}")

    def unsupported(self, key: str, value: object, why: str = "is not something that tradespace understands for this family") -> UnsupportedError:
        return UnsupportedError(
            f"{self.name}: config field '{self.path}{key}' = {shown(value)} {why} ({self.family}); refused, because it could change results"
        )

    def raw(self, *keys: str) -> Any:
        """The value under the first of `keys` that is there and not null, else None. All of them count as read; two that disagree are an error."""
        found = _MISSING
        for key in keys:
            self._read.add(key)
            value = self.values.get(key)
            if value is None:
                continue
            if found is not _MISSING and found != value:
                raise self.wrong(key, f"is {shown(value)}, but '{keys[0]}' says {shown(found)}; they are two names for one thing")
            found = value
        return None if found is _MISSING else found

    def optional_integer(self, *keys: str, low: int = 1, high: int = MAX_WIDTH) -> int | None:
        value = self.raw(*keys)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(keys[0], f"must be a whole number; it is {shown(value)}")
        if not low <= value <= high:
            raise self.wrong(keys[0], f"must lie between {low} and {high}; it is {shown(value) if abs(value) < 10**18 else 'beyond all bounds'}")
        return value

    def integer(self, *keys: str, default: int | None = None, low: int = 1, high: int = MAX_WIDTH) -> int:
        """A whole number within bounds; the family's published default where absent, or an error where there is none."""
        value = self.optional_integer(*keys, low=low, high=high)
        if value is not None:
            return value
        if default is None:
            raise self.wrong(keys[0], "is missing; without it the model's size is unknown")
        return default

    def optional_number(self, *keys: str, low: float = 0.0, high: float = 1e12) -> float | None:
        value = self.raw(*keys)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
            raise self.wrong(keys[0], f"must be a finite number; it is {shown(value)}")
        if not low <= value <= high:
            raise self.wrong(keys[0], f"must lie between {low:g} and {high:g}; it is {shown(value)}")
        return float(value)

    def number(self, *keys: str, default: float, low: float = 0.0, high: float = 1e12) -> float:
        value = self.optional_number(*keys, low=low, high=high)
        return default if value is None else value

    def optional_flag(self, *keys: str) -> bool | None:
        value = self.raw(*keys)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(keys[0], f"must be true or false; it is {shown(value)}")
        return value

    def flag(self, *keys: str, default: bool) -> bool:
        value = self.optional_flag(*keys)
        return default if value is None else value

    def text(self, *keys: str, default: str) -> str:
        value = self.raw(*keys)
        if value is not None and not isinstance(value, str):
            raise self.wrong(keys[0], f"must be text; it is {shown(value)}")
        return default if value is None else value

    def per_layer(self, key: str, num_layers: int, kinds: type | tuple[type, ...]) -> list[Any] | None:
        """A list with one entry of `kinds` per layer (longer lists are cut, as transformers reads them), or None where absent."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, list) or any(not isinstance(entry, kinds) for entry in value[:num_layers]):
            raise self.wrong(key, f"must be a list with one entry per layer; it is {shown(value)}")
        if len(value) < num_layers:
            raise self.wrong(key, f"has {len(value)} entries for {num_layers} layers")
        return value[:num_layers]

    def require(self, key: str, *allowed: object) -> None:
        """The key is absent or holds one of `allowed`; anything else is a mechanism that we do not have."""
        value = self.raw(key)
        if value is not None and not any(value == want and isinstance(value, bool) == isinstance(want, bool) for want in allowed):
            raise self.unsupported(key, value)

    def nested(self, key: str, *, family: str | None = None, harmless: Iterable[str] = ()) -> ConfigReader:
        """A reader for the dictionary under `key`; `finish` of this one finishes it too."""
        value = self.raw(key)
        if not isinstance(value, Mapping):
            raise self.wrong(key, f"must be a dictionary; it is {shown(value)}")
        child = ConfigReader(value, name=self.name, family=family or self.family, path=f"{self.path}{key}.")
        self._nested.append((child, tuple(harmless)))
        return child

    def finish(self, harmless: Iterable[str] = ()) -> None:
        """Refuse what was not read and is not known to be harmless."""
        heads = self.values.get("architectures")
        for head in heads if isinstance(heads, list) else ():
            if isinstance(head, str) and head.endswith(_OTHER_HEADS):
                raise self.unsupported("architectures", heads, "is not a language model's head")
        for key, inert in (("is_encoder_decoder", False), ("add_cross_attention", False), ("pruned_heads", {})):
            self.require(key, inert)
        known = HARMLESS.union(harmless)
        for key, value in self.values.items():
            if value is not None and key not in self._read and key not in known:
                raise self.unsupported(str(key), value)
        for child, child_harmless in self._nested:
            child.finish(child_harmless)
