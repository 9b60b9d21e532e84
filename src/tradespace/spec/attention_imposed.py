"""A pattern that is not the model's own, imposed on it: less to read and to compute, at a loss that nobody knows until it is measured."""

from __future__ import annotations

from dataclasses import replace

from tradespace.errors import InputError
from tradespace.spec.attention_pattern import Causal, Documents, Sliding, parse_pattern
from tradespace.spec.mixers import Attention
from tradespace.spec.model import ModelSpec


def impose(model: ModelSpec, text: str) -> ModelSpec:
    """`model` with a pattern on every attention layer that looks at everything; layers with a window of their own keep it. '' changes nothing.

    A sliding pattern becomes the window of such layers, so that every kernel which knows windows runs it. Raises InputError for documents: where they
    begin is a matter of the text, not of the model.
    """
    if not text:
        return model
    pattern = parse_pattern(text)
    if isinstance(pattern, Documents):
        raise InputError("a documents pattern belongs to one packed text; it cannot be imposed on a model")
    layers = []
    for layer in model.layers:
        mixer = layer.mixer
        if isinstance(mixer, Attention) and mixer.window is None and mixer.pattern is None and not isinstance(pattern, Causal):
            mixer = replace(mixer, window=pattern.window) if isinstance(pattern, Sliding) else replace(mixer, pattern=pattern)
            layer = replace(layer, mixer=mixer)
        layers.append(layer)
    return replace(model, layers=tuple(layers), imposed=pattern.describe())
