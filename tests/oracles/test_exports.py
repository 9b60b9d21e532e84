"""Exports through the parsers of the tools themselves, where these are installed: `pip install --no-deps vllm sglang` and what their parsers import is enough.

Every weight format, store, block size and kernel that a plan may name, on one card and on two: no flag that the tool does not know, no value that it refuses,
and what it read is what the plan says.
"""

import argparse
import importlib
from typing import Any

import pytest

from tradespace.api import plan
from tradespace.planner.candidate import Candidate
from tradespace.planner.export import export

CARD, TWO = "h100-80gb", "2x h100-80gb"
CASES: dict[str, tuple[str, dict[str, str]]] = {
    **{f"weights {name}": (CARD, {"weights": name}) for name in ("fp32", "bf16", "fp16", "int8", "fp8", "int4", "int4-g32", "nf4", "int3", "e8")},
    **{f"store {name}": (CARD, {"weights": "bf16", "kv_store": name}) for name in ("bf16", "fp8", "int8", "int4")},
    **{f"blocks of {size}": (CARD, {"weights": "bf16", "block_size": size}) for size in ("8", "16", "32", "64", "128", "256")},
    **{f"kernel {name}": (CARD, {"weights": "bf16", "attention": name}) for name in ("flash", "sdpa", "chunked", "reference")},
    "contiguous": (CARD, {"weights": "bf16", "layout": "contiguous"}),
    "no sharing": (CARD, {"weights": "bf16", "prefix_sharing": "off"}),
    "streamed": (CARD, {"weights": "bf16", "placement": "host"}),
    "two cards": (TWO, {"weights": "bf16", "tensor_parallel": "2"}),
    "processor": ("ryzen-7950x", {"weights": "bf16"}),
}


def best(case: str) -> Candidate:
    device, pins = CASES[case]
    found = plan("llama-3.1-8b", memory="60GB", device=device, pins=pins, context=2048, concurrency=2).best
    assert found is not None
    return found


@pytest.fixture(scope="module")
def vllm() -> argparse.ArgumentParser:
    platforms = pytest.importorskip("vllm.platforms")
    platforms._current_platform = importlib.import_module("vllm.platforms.cpu").CpuPlatform()  # no card is needed to read a command line
    parser = importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser()
    return importlib.import_module("vllm.engine.arg_utils").AsyncEngineArgs.add_cli_args(parser)


@pytest.fixture(scope="module")
def sglang() -> argparse.ArgumentParser:
    arguments = pytest.importorskip("sglang.srt.server_args")
    parser = argparse.ArgumentParser()
    arguments.ServerArgs.add_cli_args(parser)
    return parser


def read(parser: argparse.ArgumentParser, words: list[str]) -> Any:
    found, unknown = parser.parse_known_args(words)
    assert not unknown
    return found


@pytest.mark.parametrize("case", CASES)
def test_vllm_reads_it(case, vllm):
    candidate = best(case)
    found = export(candidate, "vllm", "org/name")
    assert found.arguments[:2] == ("serve", "org/name")
    got = read(vllm, ["--model", *found.arguments[1:]])
    known = importlib.import_module("vllm.model_executor.layers.quantization").QUANTIZATION_METHODS
    assert got.model == "org/name" and got.max_model_len == candidate.plan.max_context and got.max_num_seqs == candidate.plan.max_sequences
    assert got.quantization is None or got.quantization in known
    assert got.enable_prefix_caching == candidate.plan.kv.prefix_sharing and got.tensor_parallel_size == candidate.tensor_parallel
    stores = importlib.import_module("typing").get_args(importlib.import_module("vllm.config.cache").CacheDType)
    assert got.kv_cache_dtype in stores


@pytest.mark.parametrize("case", CASES)
def test_sglang_reads_it(case, sglang):
    candidate = best(case)
    got = read(sglang, list(export(candidate, "sglang", "org/name").arguments))
    assert got.model_path == "org/name" and got.context_length == candidate.plan.max_context and got.max_total_tokens == candidate.kv_tokens
    assert got.disable_radix_cache != candidate.plan.kv.prefix_sharing and got.tp_size == candidate.tensor_parallel
