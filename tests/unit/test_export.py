"""Exports: the numbers are the plan's, whatever a tool cannot say is a note, and the tools that install here read what we write."""

import ast
import importlib.util
import shlex

import pytest
import yaml

from tradespace.api import plan
from tradespace.errors import InputError
from tradespace.planner.export import EXPORTERS, export

# flags that the tools' own parsers know (vLLM 0.33.0, SGLang 0.5.23: run through them) or list (llama.cpp's common/arg.cpp of 2026-08-16: read); where the
# first two are installed, tests/oracles/test_exports.py runs every export through the parsers themselves
FLAGS = {
    "vllm": {"--dtype", "--quantization", "--max-model-len", "--max-num-seqs", "--max-num-batched-tokens", "--kv-cache-dtype", "--block-size",
             "--num-gpu-blocks-override", "--enable-prefix-caching", "--no-enable-prefix-caching", "--tensor-parallel-size", "--cpu-offload-gb",
             "--gpu-memory-utilization"},
    "sglang": {"--model-path", "--dtype", "--quantization", "--context-length", "--max-running-requests", "--chunked-prefill-size",
               "--max-total-tokens", "--kv-cache-dtype", "--page-size", "--disable-radix-cache", "--tp-size", "--cpu-offload-gb", "--mem-fraction-static",
               "--device", "--attention-backend"},
    "llama.cpp": {"-m", "-c", "-np", "-b", "-ub", "-ctk", "-ctv", "-fa", "-ngl", "-t", "-sm"},
}  # fmt: skip
CASES = {
    "one card": ("llama-3.1-8b", "20GB", "rtx-4090", {}),
    "streamed": ("llama-2-70b", "24GB", "rtx-4090", {"placement": "host"}),
    "two cards": ("llama-2-70b", "75GB", "2x h100-80gb", {"weights": "bf16", "tensor_parallel": "2"}),
    "nf4, coded cache": ("llama-3.1-8b", "20GB", "rtx-4090", {"weights": "nf4", "kv_store": "int4"}),
    "processor": ("smollm2-135m", "900MiB", "ryzen-7950x", {"weights": "bf16"}),
    "windowed": ("qwen3-0.6b", "8GB", "ryzen-7950x", {"kv_retain": "sliding:512"}),
}


@pytest.fixture(scope="module", params=CASES)
def best(request):
    model, memory, device, pins = CASES[request.param]
    pins = {"layout": "paged", "block_size": "16"} | pins
    found = plan(model, memory=memory, device=device, pins={k: v for k, v in pins.items() if k != "placement"}, context=2048, concurrency=2)
    assert found.best is not None
    return found.best


@pytest.mark.parametrize("tool", ["vllm", "sglang", "llama.cpp"])
def test_command_lines_use_flags_that_the_tool_has(best, tool):
    found = export(best, tool, "org/name")
    assert shlex.split(found.text.replace("\\\n", " "))[-len(found.arguments) :] == list(found.arguments)
    flags = [word for word in found.arguments if word.startswith("-") and not word[1:].isdigit()]
    assert set(flags) <= FLAGS[tool] and len(flags) == len(set(flags))


def _value(found, flag):
    return found.arguments[found.arguments.index(flag) + 1]


def test_numbers_are_the_plans(best):
    vllm, llama = export(best, "vllm", "m"), export(best, "llama.cpp", "m")
    assert int(_value(vllm, "--max-model-len")) == best.plan.max_context
    assert int(_value(vllm, "--num-gpu-blocks-override")) * 16 == best.kv_tokens
    assert int(_value(llama, "-c")) == best.plan.max_context * best.plan.max_sequences
    if best.question.device.kind == "cuda":
        assert float(_value(vllm, "--gpu-memory-utilization")) * best.question.device.memory_bytes <= best.question.memory_bytes
    if best.tensor_parallel > 1:
        assert int(_value(vllm, "--tensor-parallel-size")) == best.tensor_parallel


@pytest.mark.parametrize("tool", EXPORTERS)
def test_what_a_tool_cannot_say_is_a_note(best, tool):
    notes = "\n".join(export(best, tool, "m").notes)
    assert "budget" in notes or tool == "transformers"
    if best.kv.retain.kind != "full" and tool != "trl":
        assert "KV retention" in notes
    if best.placement.streamed_layers:
        assert "layers" in notes or tool == "transformers"
    if best.weights.exceptions:
        assert "mixed formats" in notes
    if best.kv.store == "int4" and tool in ("vllm", "sglang"):
        assert "KV store int4" in notes


def test_transformers_reads_it(best):
    transformers = pytest.importorskip("transformers")
    text = export(best, "transformers", "org/name").text
    tree = ast.parse(text)
    # the objects that need no weights are built by the library itself; a name or argument that it lacks raises
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("GenerationConfig", "BitsAndBytesConfig")]
    assert calls
    for call in calls:
        assert isinstance(call.func, ast.Name)
        built = eval(compile(ast.Expression(call), "export", "eval"), {call.func.id: getattr(transformers, call.func.id), "torch": __import__("torch")})
        if isinstance(built, transformers.GenerationConfig):
            assert built.max_new_tokens == best.question.workload.output_tokens
            built.validate(strict=True)
    assert all(hasattr(transformers, name.name) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed: pip install trl")
def test_trl_reads_it(best, tmp_path):
    from transformers import HfArgumentParser
    from trl.trainer.model_config import ModelConfig  # pyright: ignore[reportMissingImports]
    from trl.trainer.sft_config import SFTConfig  # pyright: ignore[reportMissingImports]

    settings = yaml.safe_load(export(best, "trl", "org/name").text)
    parser = HfArgumentParser([SFTConfig, ModelConfig])  # pyright: ignore[reportArgumentType]
    training, model = parser.parse_dict(settings | {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True})
    assert training.max_length == best.plan.max_context and model.use_peft and model.model_name_or_path == "org/name"


def test_ollama_file_has_known_parameters(best):
    lines = [line.split(" ", 2) for line in export(best, "ollama", "org/name").text.splitlines() if not line.startswith("#")]
    assert lines[0][0] == "FROM" and lines[0][1].endswith(".gguf")
    assert all(line[0] == "PARAMETER" and line[1] in {"num_ctx", "num_batch", "num_gpu", "num_thread"} and line[2].isdigit() for line in lines[1:])
    assert export(best, "ollama", "ollama:llama3.2").text.splitlines()[2] == "FROM llama3.2"


def test_unknown_tool_is_named(best):
    with pytest.raises(InputError, match=r"no export for 'tgi'. Known: vllm"):
        export(best, "tgi", "m")
