"""Calibration text → windows of token ids. No text is built in: what a model is quantized for is the user's to say."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from tradespace.errors import InputError
from tradespace.loading.tokenizer import Tokenizer
from tradespace.quality.text import begins_with_bos, read_text
from tradespace.units import MiB

# of a long text so much is read per token that is wanted, so that the samples come from all over it
BYTES_PER_TOKEN = 64
LEAST_BYTES = 4 * MiB


def sample_windows(ids: Sequence[int], *, samples: int, context: int, seed: int, bos_id: int | None = None) -> list[list[int]]:
    """`samples` windows of `context` tokens that do not overlap, drawn from all over the text, in the text's order; each begins with BOS where there is one.

    Raises InputError (need, have, remedy) where the text is too short.
    """
    if samples < 1 or context < 2:
        raise InputError(f"--samples {samples} --context {context}: calibration needs at least one sample of at least 2 tokens")
    body = context - (bos_id is not None)
    available = len(ids) // body
    if available < samples:
        fits = f"--samples {available}" if available else f"--context {max(2, len(ids) // 2)} --samples 1"
        raise InputError(
            f"the calibration text is too short: {samples} samples of {context} tokens need {samples * body:,} tokens; it has {len(ids):,}. "
            f"Give a longer text, or {fits}"
        )
    # windows anywhere in the text: what is left over is spread between them by chance
    draw = random.Random(seed)
    spare = len(ids) - samples * body
    cuts = sorted(draw.randint(0, spare) for _ in range(samples))
    head = [] if bos_id is None else [bos_id]
    return [[*head, *ids[cut + index * body : cut + (index + 1) * body]] for index, cut in enumerate(cuts)]


def calibration_windows(tokenizer: Tokenizer, text_path: Path, *, samples: int, context: int, seed: int) -> list[list[int]]:
    """The windows of a text file. Raises InputError for a file that is missing, empty, not UTF-8 or too short."""
    text = read_text(text_path, max(LEAST_BYTES, samples * context * BYTES_PER_TOKEN))
    ids = tokenizer.encode(text, add_special_tokens=False) if text.strip() else []
    bos_id = tokenizer.bos_id if begins_with_bos(tokenizer) else None
    return sample_windows(ids, samples=samples, context=context, seed=seed, bos_id=bos_id)
