"""Quality as one unit: KL divergence in nats per token from the bf16 model's distribution to the plan's, on one named text.

Figures are measured by us or cited; nothing is scaled from one model, format or text to another. A figure of another model is used as it stands, and its source
names that model; the nearest in family, then in size, wins. A format without a figure on the reference text is unknown, never zero, and its source quotes
what comes nearest. Loss adds up over techniques only as an approximation, and the source then begins with "sum".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import log
from pathlib import Path

from tradespace.spec import native
from tradespace.spec.estimate import Estimate
from tradespace.spec.formats import FORMATS
from tradespace.spec.kv import KVPlan
from tradespace.spec.mixers import Attention
from tradespace.spec.model import ModelSpec
from tradespace.spec.plan import Plan
from tradespace.spec.tensors import num_parameters
from tradespace.spec.weights import WeightPlan

REFERENCE_TEXT = "wikitext-2"
LARGE, SPEAKS_UP_TO = 10**9, 16  # parameters from which on figures speak for every size; how much larger a model than a small one may be
EXACT = Estimate(0.0, "exact")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One published or measured divergence. `kind`: "weights", "kv" or "pattern"; `choice`: our name of the format, store or pattern;
    `held_as`: what was in fact measured."""

    kind: str
    choice: str
    kl_nats: float
    family: str
    parameters: float
    model: str
    held_as: str
    source: str
    date: str
    text: str = REFERENCE_TEXT

    @property
    def label(self) -> str:
        where = "" if self.source.startswith("measured") else "cited: "
        return f"{where}{self.source}, {self.model} {self.held_as} on {self.text} ({self.date})"


_README = "llama.cpp tools/perplexity/README.md"
_LLAMA3 = {"family": "llama", "parameters": 8.03e9, "model": "Llama-3-8B", "date": "2024-05"}
_LLAMA2 = {"family": "llama", "parameters": 6.74e9, "model": "Llama-2-7B", "date": "2024-05"}
_KV_PULL = "llama.cpp pull request 7412"

# What stands for a format of ours must hold it alike: q4_0 is int4-g32 to the bit; q8_0 and its cache differ in the reach of a scale, which `held_as` says.
CITED: tuple[Figure, ...] = (
    Figure(kind="weights", choice="fp16", kl_nats=0.00002515, held_as="fp16 against bf16", source=_README, **_LLAMA3),
    Figure(kind="weights", choice="int8", kl_nats=0.001355, held_as="q8_0 (a scale per 32, ours per row)", source=_README, **_LLAMA3),
    Figure(kind="weights", choice="int8", kl_nats=0.000369, held_as="q8_0 (a scale per 32, ours per row)", source=_README, **_LLAMA2),
    Figure(kind="weights", choice="int4-g32", kl_nats=0.071940, held_as="q4_0", source=_README, **_LLAMA3),
    Figure(
        kind="activations",
        choice="int8",
        kl_nats=0.0028,
        family="llama",
        parameters=1.35e8,
        model="SmolLM2-135M",
        held_as="a scale per 32, Q4_1 weights",
        source="a CPU decoder probe of the same arithmetic",
        date="2026-11",
    ),
    Figure(kind="kv", choice="int8", kl_nats=0.000980, held_as="q8_0 (a scale per 32, ours per token and head)", source=_KV_PULL, **_LLAMA3),
)

# What experiment `quality` measured here: `lab/figures.py` writes it from the record, nobody by hand.
MEASURED_FILE = Path(__file__).with_name("quality_measured.json")
MEASURED: tuple[Figure, ...] = tuple(Figure(**values) for values in json.loads(MEASURED_FILE.read_text(encoding="utf-8")))
FIGURES: tuple[Figure, ...] = (*MEASURED, *CITED)

# Published, but of another layout or on another text: quoted where we have nothing to rank by, never used as a figure.
NEAREST: dict[tuple[str, str], str] = {
    (
        "weights",
        "int4",
    ): "0.00729 for GPTQ w4a16 of Llama-3.1-8B on GPQA answers, an easier text (cyankiwi, 2026-05); q4_0, a scale per 32: 0.0719 on wikitext-2",
    ("weights", "nf4"): "0.00835 for bitsandbytes nf4 of Llama-3.1-8B on GPQA answers, an easier text (cyankiwi, 2026-05)",
    ("weights", "int3"): "0.228 for q3_K_S (3.4 bits) of Llama-3-8B on wikitext-2 (llama.cpp)",
    ("weights", "int2"): "0.445 for q2_K (3.0 bits) of Llama-3-8B on wikitext-2 (llama.cpp)",
    ("weights", "e8"): "0.812 for iq2_xxs (2.2 bits, an E8 grid without rotation) of Llama-3-8B on wikitext-2 (llama.cpp)",
}


def find_figure(kind: str, choice: str, model: ModelSpec, figures: tuple[Figure, ...] = FIGURES) -> Figure | None:
    """The figure to use: this model's own, else the same family's nearest in size, else the nearest in size; on the reference text only.

    A small model's figure speaks for models up to SPEAKS_UP_TO times its size, as small models lose several times what large ones do (int4: 0.80 measured on
    135 M parameters, 0.07 published for 8 B): for what is larger the loss is unknown, not that.
    """
    size = num_parameters(model)
    choice = FORMATS[choice].name if kind == "weights" else choice  # what an alias stands for
    usable = [figure for figure in figures if figure.kind == kind and figure.choice == choice and figure.text == REFERENCE_TEXT]
    usable = [
        figure for figure in usable if figure.model.lower() == model.name.lower() or figure.parameters >= LARGE or size <= SPEAKS_UP_TO * figure.parameters
    ]
    return min(
        usable,
        key=lambda figure: (figure.model.lower() != model.name.lower(), figure.family != model.family, abs(log(figure.parameters / size))),
        default=None,
    )


def _of_choice(kind: str, choice: str, model: ModelSpec) -> Estimate:
    figure = find_figure(kind, choice, model)
    if figure is not None:
        return Estimate(figure.kl_nats, figure.label)
    hint = NEAREST.get((kind, choice))
    return Estimate.unknown(f"no figure for {kind} {choice} on {REFERENCE_TEXT}" + (f"; nearest: {hint}" if hint else ""))


def weight_quality(model: ModelSpec, format_name: str) -> Estimate:
    """Loss of holding the weights in one format. bf16 is the reference; wider formats hold every bf16 number as it is, and fp16 what was stored as fp16."""
    if format_name in ("fp32", "bf16") or (format_name == "fp16" and model.stored_dtype in ("fp16", "float16")):
        return EXACT
    return _of_choice("weights", format_name, model)


def kv_quality(model: ModelSpec, kv: KVPlan | str, dense: str) -> Estimate:
    """Loss of how keys and values are held: none in bf16, as the reference does, and none where the mantissa is longer than that."""
    kv = KVPlan(store=kv) if isinstance(kv, str) else kv
    if all(store.exact for store in kv.stores):
        return EXACT
    return _of_choice("kv", kv.describe_store(), model)


def activation_quality(model: ModelSpec, weights: WeightPlan, activations: str) -> Estimate:
    """Loss of the native kernels' int8 activations (a scale per 32): none where no matrix is multiplied by those."""
    if weights.layout != "native" or all(native.activation_form(name, activations) != "int8" for name in weights.names):
        return EXACT
    return _of_choice("activations", "int8", model)


def retention_quality(model: ModelSpec, plan: Plan | KVPlan) -> Estimate:
    """Loss of forgetting tokens: none where no layer looks further back than what is kept, or what is gone is rebuilt. Figures hold for the very same
    policy.
    """
    kv = plan if isinstance(plan, KVPlan) else plan.kv
    mixers = [layer.mixer for layer in model.layers if isinstance(layer.mixer, Attention)]
    if all(kv.retain.exact_for(mixer.window) for mixer in mixers):
        return EXACT
    figure = find_figure("retain", kv.retain.describe(), model)
    if figure is not None:
        return Estimate(figure.kl_nats, figure.label)
    return Estimate.unknown(f"no figure for {kv.retain.describe()} retention on {REFERENCE_TEXT}")


def pattern_quality(model: ModelSpec) -> Estimate:
    """Loss of an attention pattern that is not the model's own: unknown unless it was measured, and causal is what it does anyway."""
    if model.imposed in ("", "causal"):
        return EXACT
    return _of_choice("pattern", model.imposed, model)


def combine(parts: list[Estimate]) -> Estimate:
    """The loss of several techniques at once: exact ones add nothing; one that is not decides; of more the sum, marked so; one unknown makes all unknown."""
    for part in parts:
        if not part.known:
            return part
    lossy = [part for part in parts if part.value]
    if not lossy:
        return EXACT
    if len(lossy) == 1:
        return lossy[0]
    return Estimate(sum(part.require() for part in lossy), "sum of " + " + ".join(part.source for part in lossy))


def quality(model: ModelSpec, plan: Plan) -> Estimate:
    """KL divergence of `plan` to the bf16 model in nats per token.

    A mixture of formats has the loss of its default format: exceptions in a wider format can only be better, and that nobody published by how much.
    """
    exceptions = [weight_quality(model, name) for name in plan.weights.names if _narrower(name, plan.weights.default)]
    return combine(
        [
            weight_quality(model, plan.weights.default),
            *exceptions,
            activation_quality(model, plan.weights, plan.activations),
            kv_quality(model, plan.kv, plan.weights.dense),
            retention_quality(model, plan),
            pattern_quality(model),
        ]
    )


def _narrower(name: str, than: str) -> bool:
    return FORMATS[name].bits < FORMATS[than].bits
