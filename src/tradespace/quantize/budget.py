"""What quantizing a model takes at its worst moment, before it begins: one layer and what a method keeps beside it."""

from __future__ import annotations

from tradespace.errors import BudgetError
from tradespace.quantize.methods import Method, layer_matrices
from tradespace.quantize.pipeline import CHUNK_ROWS
from tradespace.quantize.smooth_search import SAMPLED
from tradespace.quantize.source import STAGING_BYTES
from tradespace.spec.mixers import Attention
from tradespace.spec.model import DenseFFN, ModelSpec
from tradespace.units import MiB, format_bytes

# copies of the matrix at hand beside the layer itself, in fp32: what it was divided by, tried, rounded, and how far that is off (measured)
WORK_COPIES = 5
# libraries that come in on first use, threads' own buffers, and the heap's slack (measured)
SLACK_BYTES = 40 * MiB


def working_bytes(spec: ModelSpec, method: Method, *, samples: int, context: int) -> int:
    """Bytes beside the process: the largest layer as it was and as it became, its Gram matrices and a factor, one matrix at work, one window's activations."""
    worst = 0
    for index, layer in enumerate(spec.layers):
        matrices = layer_matrices(spec, index)
        held = 2 * 4 * sum(tensor.num_elements for tensor in matrices)
        work = WORK_COPIES * 4 * max((tensor.num_elements for tensor in matrices), default=0)
        learned = 0
        if method.needs_text:
            widths = [tensor.shape[1] for tensor in matrices]
            learned = 4 * sum(width**2 for width in widths) + 3 * 4 * max(widths, default=0) ** 2
            mixer, ffn = layer.mixer, layer.ffn
            inner = 3 * ffn.F if isinstance(ffn, DenseFFN) else 0
            heads = 3 * (mixer.N + 2 * mixer.K) * mixer.H if isinstance(mixer, Attention) else 0
            activations = 4 * context * (4 * spec.D + max(inner, heads))
            if method.aims:
                activations *= 2  # of both models
            if method.fold == "smooth-search":
                activations = max(activations, 4 * SAMPLED * (sum(widths) + 4 * max(widths, default=0)))
            # activations are gone while a matrix is rounded
            work = max(work, activations)
        worst = max(worst, held + learned + work)
    table = 2 * STAGING_BYTES + WORK_COPIES * 4 * CHUNK_ROWS * spec.D
    ids = 48 * samples * context if method.needs_text else 0
    return max(worst, table) + 2 * STAGING_BYTES + ids + SLACK_BYTES


def check_budget(spec: ModelSpec, method: Method, budget_bytes: int, *, process_bytes: int, samples: int, context: int) -> int:
    """The bytes that the process will take at its peak. Raises BudgetError (need, have, remedy) where the budget is smaller."""
    need = process_bytes + working_bytes(spec, method, samples=samples, context=context)
    if need <= budget_bytes:
        return need
    remedy = f"--memory {-(-need // MiB)}MiB"
    if method.needs_text:
        shorter = next(
            (c for c in (1024, 512, 256, 128) if c < context and process_bytes + working_bytes(spec, method, samples=samples, context=c) <= budget_bytes), None
        )
        if shorter is not None:
            remedy += f" or --context {shorter}"
    raise BudgetError(
        f"quantizing {spec.name} by {method.name} layer by layer needs {format_bytes(need)} ({format_bytes(process_bytes)} of it the process itself); "
        f"the budget is {format_bytes(budget_bytes)}. Fits with {remedy}",
        need_bytes=need,
        have_bytes=budget_bytes,
    )
