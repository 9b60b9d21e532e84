"""What paged attention on a CUDA device takes (`kernels/attention/paged.py`), without torch."""

from __future__ import annotations

from tradespace.spec.attention_pattern import Prefix, Sliding
from tradespace.spec.mixers import Attention

HEAD_WIDTH = 256  # a wider head's tiles do not fit beside each other


def mixer_refusal(mixer: Attention) -> str | None:
    """Why paged attention cannot compute such a layer; None: it can."""
    if mixer.alibi or mixer.softmax_scale <= 0:
        return "paged attention knows no linear position biases (ALiBi), and its scale is positive"
    if mixer.output_gate or mixer.value_from_keys or mixer.head_gate or mixer.qk_norm == "full":
        return "paged attention has no gates, shared projections or norms over all heads together"
    if mixer.pattern is not None and not isinstance(mixer.pattern, Sliding | Prefix):
        return f"paged attention sees causally, in windows and prefixes, not by {mixer.pattern.kind} patterns"
    if max(mixer.H, mixer.Hv) > HEAD_WIDTH:
        return f"paged attention takes heads of at most {HEAD_WIDTH} elements, not {max(mixer.H, mixer.Hv)}"
    return None
