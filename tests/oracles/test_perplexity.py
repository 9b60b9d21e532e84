"""llama.cpp beside us on one text: the same windows of the same file, dequantized to F32, lose the same nats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tradespace as ts
from tradespace.lab.agreement import LlamaCpp, write_f32_copy
from tradespace.lab.common import data_file
from tradespace.loading.pull import pull
from tradespace.loading.resolve import resolve
from tradespace.loading.tokenizer import Tokenizer
from tradespace.quality.text import encode_text

pytestmark = pytest.mark.weights
CONTEXT, TOKENS = 128, 400


@pytest.mark.parametrize("model", ["smollm2-135m", "gemma3-270m"])
@pytest.mark.parametrize("stride", [None, 48])
def test_perplexity_is_llama_cpps(model, stride, tmp_path):
    pull(model, progress=False)
    files = resolve(model, offline=True)
    copy = tmp_path / "f32.gguf"
    write_f32_copy(files.weights[0], copy)
    text = data_file("wikitext2", "wiki.test.raw")
    windows = encode_text(Tokenizer.from_files(files), Path(text), context=CONTEXT, stride=stride, tokens=TOKENS).windows
    nats: list[float] = []
    with LlamaCpp(copy, context=CONTEXT) as oracle:
        for passage in windows:
            logprobs_TV = torch.cat(list(oracle.logprobs(passage.ids)))
            nats += [-float(logprobs_TV[at - 1, passage.ids[at]]) for at in range(passage.first, len(passage.ids))]
    found = ts.evaluate(model, text=Path(text), context=CONTEXT, stride=stride, tokens=TOKENS, weights="fp32", memory="5GiB").perplexity
    assert found is not None
    assert found.num_tokens == len(nats) == windows.num_scored
    assert found.nats_per_token == pytest.approx(sum(nats) / len(nats), abs=2e-4)
