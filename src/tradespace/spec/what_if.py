"""What a model would cost if it were shaped otherwise: deeper or wider, with fewer KV heads, at equal parameters.

A change keeps what it does not name. Width takes the feed-forward along (its ratio stays) and, the head size being kept, the number of heads; heads take
the KV heads along at the same group size unless those are named too. Learned positions, windows, norms and vocabulary stay.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypedDict, cast

from tradespace.errors import InputError
from tradespace.spec.families.reader import MAX_CONTEXT, MAX_HEADS, MAX_LAYERS, MAX_WIDTH
from tradespace.spec.mixers import Attention
from tradespace.spec.model import DenseFFN, LayerSpec, ModelSpec
from tradespace.spec.tensors import num_parameters

_LIMITS = {"layers": MAX_LAYERS, "width": MAX_WIDTH, "heads": MAX_HEADS, "kv_heads": MAX_HEADS, "context": MAX_CONTEXT}
CHANGES = (*_LIMITS, "ffn_ratio", "equal_parameters")
MAX_RATIO = 256.0


class Changes(TypedDict, total=False):
    """The keyword arguments of `what_if`."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn_ratio: float
    context: int
    equal_parameters: bool


def parse_what_if(text: str) -> Changes:
    """The arguments of `what_if` out of "layers=40,width=8192,ffn_ratio=3.5"; `equal_parameters` alone means true.

    >>> parse_what_if("layers=40, width=8192, equal_parameters")
    {'layers': 40, 'width': 8192, 'equal_parameters': True}
    """
    found: dict[str, int | float | bool] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        key, given, value = (piece.strip() for piece in part.partition("="))
        if key not in CHANGES:
            raise InputError(f"what-if: unknown change '{key}'. Known: {', '.join(CHANGES)}")
        if key in found:
            raise InputError(f"what-if: '{key}' is given twice")
        if key == "equal_parameters":
            if value.lower() not in ("", "true", "false", "yes", "no"):
                raise InputError(f"what-if: equal_parameters is true or false; got '{value}'")
            found[key] = value.lower() in ("", "true", "yes")
            continue
        try:
            found[key] = float(value) if key == "ffn_ratio" else int(value)
        except ValueError:
            raise InputError(f"what-if: '{key}' needs a number, as in {key}={'3.5' if key == 'ffn_ratio' else '8'}; got '{value if given else part}'") from None
    if not found:
        raise InputError(f"what-if: no change given. Write for example layers=40,width=8192. Known: {', '.join(CHANGES)}")
    return cast(Changes, found)


def what_if(
    model: ModelSpec,
    *,
    layers: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    ffn_ratio: float | None = None,
    context: int | None = None,
    equal_parameters: bool = False,
) -> ModelSpec:
    """`model` with other layers, width (D), query heads (N), KV heads (K), feed-forward ratio (F / D) or context; plan only, for no such weights exist.

    equal_parameters  chooses the depth so that the total of parameters stays as near to the model's own as whole layers allow.

    Raises InputError for a model whose layers are not softmax attention with a dense feed-forward, and for numbers that do not fit together.
    """
    _check(layers=layers, width=width, heads=heads, kv_heads=kv_heads, context=context)
    if ffn_ratio is not None and not 0 < ffn_ratio <= MAX_RATIO:
        raise InputError(f"what-if: ffn_ratio must lie above 0 and at most at {MAX_RATIO:g}; got {ffn_ratio}")
    if equal_parameters and layers is not None:
        raise InputError("what-if: layers and equal_parameters both decide the depth; give one of them")
    D = width or model.D
    period = _period(model)
    changed = [_layer(model, layer, D, heads, kv_heads, ffn_ratio) for layer in model.layers[:period]]
    depth = layers or model.L
    made = replace(
        model,
        name=f"{model.name} what if",
        D=D,
        layers=_repeated(changed, model, depth, period),
        max_context=context or model.max_context,
        # a learned table has a row per position
        learned_positions=(context + model.position_offset) if context and model.learned_positions else model.learned_positions,
        embed_scale=D**0.5 if model.embed_scale == model.D**0.5 else model.embed_scale,
        quantization=None,
        published_bytes=None,
        plan_only="a model that was only thought of has no weights",
    )
    if equal_parameters:
        depth = _depth_for(made, num_parameters(model), changed)
        made = replace(made, layers=_repeated(changed, model, depth, period))
    return made


def _check(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LIMITS[name]):
            raise InputError(f"what-if: {name} must be a whole number between 1 and {_LIMITS[name]}; got {value}")


def _period(model: ModelSpec) -> int:
    """Least number of layers after which the pattern of layers repeats: 1 where all are alike, 2 for Gemma 2, 6 for Gemma 3."""
    for period in range(1, model.L):
        if all(model.layers[i] == model.layers[i % period] for i in range(period, model.L)):
            return period
    return model.L


def _repeated(pattern: list[LayerSpec], model: ModelSpec, depth: int, period: int) -> tuple[LayerSpec, ...]:
    if period == model.L and depth != model.L and model.L > 1:
        raise InputError(
            f"what-if: the {model.L} layers of {model.name} follow no pattern that another depth could repeat; change width, heads or context instead"
        )
    return tuple(pattern[i % period] for i in range(depth))


def _layer(model: ModelSpec, layer: LayerSpec, D: int, heads: int | None, kv_heads: int | None, ffn_ratio: float | None) -> LayerSpec:
    mixer, ffn = layer.mixer, layer.ffn
    if not isinstance(mixer, Attention) or not isinstance(ffn, DenseFFN):
        raise InputError(f"what-if: {model.name} has layers other than softmax attention with a dense feed-forward; only those can be reshaped")
    if heads is None:
        scaled = mixer.N * D
        if scaled % model.D:
            raise InputError(f"what-if: at width {D} the {mixer.N} heads of size {mixer.H} do not scale to a whole number; give heads too")
        N = scaled // model.D
    else:
        N = heads
    if kv_heads is not None:
        K = kv_heads
    elif mixer.K == 1:
        K = 1  # one head of keys and values for all stays one
    elif N % mixer.G == 0:
        K = N // mixer.G
    else:
        raise InputError(f"what-if: {N} heads cannot keep groups of {mixer.G}; give kv_heads too")
    if N % K:
        raise InputError(f"what-if: {K} KV heads do not divide {N} heads")
    F = round((ffn.F / model.D if ffn_ratio is None else ffn_ratio) * D)
    return replace(layer, mixer=replace(mixer, N=N, K=K), ffn=replace(ffn, F=max(F, 1)))


def _depth_for(made: ModelSpec, target: int, pattern: list[LayerSpec]) -> int:
    """The depth whose total lies nearest to `target`; the outside of the layers and one period of them give every depth by arithmetic."""
    period = len(pattern)
    outside = num_parameters(replace(made, layers=()))
    sizes = [num_parameters(replace(made, layers=(layer,))) - outside for layer in pattern]
    whole, best, nearest = sum(sizes), 1, None
    # only depths around the target are worth a look; the bound keeps hostile ratios from long loops
    first = min(max(1, (target - outside) // whole * period - period), MAX_LAYERS)
    for depth in range(first, min(first + 3 * period, MAX_LAYERS) + 1):
        total = outside + depth // period * whole + sum(sizes[: depth % period])
        if nearest is None or abs(total - target) < nearest:
            best, nearest = depth, abs(total - target)
    return best
