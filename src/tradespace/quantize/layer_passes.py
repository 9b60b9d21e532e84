"""Windows through one layer: to learn what its linears get, and to see what comes out once it is quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from tradespace.model.layer import Layer
from tradespace.quantize.gram import Gram, fake_int8, tap
from tradespace.quantize.methods import QuantizedLayer, layer_matrices
from tradespace.quantize.stream import HiddenStates, LayerRunner
from tradespace.spec.formats import find_format


def collect_grams(runner: LayerRunner, index: int, tensors: dict[str, Tensor], hidden: HiddenStates) -> dict[str, Gram]:
    """Statistics of the inputs of each matrix of a layer over all windows."""
    layer, grams = runner.build(index, tensors), {}
    prefix = f"layers.{index}."
    for tensor in layer_matrices(runner.spec, index):
        stem = tensor.name.removeprefix(prefix).removesuffix(".weight")
        grams[stem] = Gram(tensor.shape[-1])
        tap(layer, stem, _adder(grams[stem]))
    for window in range(hidden.num_windows):
        runner.run(index, layer, hidden.read(window))
    return grams


def _adder(gram: Gram) -> Callable[[Tensor, int | None], Tensor]:
    def see(x_TC: Tensor, expert: int | None) -> Tensor:
        gram.add(x_TC)
        return x_TC

    return see


def run_own(runner: LayerRunner, index: int, tensors: dict[str, Tensor], hidden: HiddenStates) -> Iterator[Tensor]:
    """Each window through the layer of these values, nothing rounded."""
    layer = runner.build(index, tensors)
    for window in range(hidden.num_windows):
        yield runner.run(index, layer, hidden.read(window))


def run_quantized(runner: LayerRunner, index: int, done: QuantizedLayer, hidden: HiddenStates) -> Iterator[Tensor]:
    """Each window through the layer as it will compute: rounded weights, and activations in int8 where the format has them so."""
    layer = built(runner, index, done.tensors, {name: fmt for name, (fmt, _) in done.codes.items()})
    for window in range(hidden.num_windows):
        yield runner.run(index, layer, hidden.read(window))


def built(runner: LayerRunner, index: int, tensors: dict[str, Tensor], formats: Mapping[str, str]) -> Layer:
    """Layer `index` of these values, its inputs rounded to int8 where the `formats` (by tensor) have them so."""
    layer = runner.build(index, tensors)
    for name, fmt in formats.items():
        if find_format(fmt).activations == 8:
            tap(layer, name.removeprefix(f"layers.{index}.").removesuffix(".weight"), lambda x_TC, expert: fake_int8(x_TC))
    return layer
