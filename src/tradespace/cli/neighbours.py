"""Flags that belong to other tools, each with what says the same here: vLLM, SGLang, llama.cpp, ollama, transformers.

Nothing is translated behind the user's back: the error shows the command to run instead.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from tradespace.errors import InputError

_WEIGHTS = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
    "fp8": "fp8",
    "bitsandbytes": "nf4",
    "awq": "int4",
    "gptq": "int4",
}
_STORES = {"f16": "fp16", "f32": "bf16", "q8_0": "int8", "q4_0": "int4", "q4_1": "int4", "fp8_e4m3": "fp8", "fp8_e5m2": "fp8", "auto": "bf16"}


@dataclass(frozen=True)
class Neighbour:
    """A foreign flag. `here`: the words that replace it, given its value; or, where nothing does, `why`. `takes`: whether a value follows."""

    tool: str
    here: Callable[[str], list[str]] | None = None
    why: str = ""
    takes: bool = True


def _to(flag: str) -> Callable[[str], list[str]]:
    return lambda value: [flag, value]


def _share(value: str) -> list[str]:
    try:
        share = float(value)
    except ValueError:
        return ["--memory", "90%"]
    return ["--memory", f"{share * 100:g}%" if share <= 1 else f"{share:g}%"]


def _gib(flag: str) -> Callable[[str], list[str]]:
    return lambda value: [flag, f"{value}GiB"]


def _weights(value: str) -> list[str]:
    return ["--weights", _WEIGHTS.get(value, value)]


def _positional(value: str) -> list[str]:
    return [value]


def _nothing(_: str) -> list[str]:
    return []


_PLANNED = "the planner decides which layers stay on the device, from the bytes it may use: state --memory (the device's) and --host-memory"
NEIGHBOURS: dict[str, Neighbour] = {
    "--gpu-memory-utilization": Neighbour("vLLM", _share),
    "--mem-fraction-static": Neighbour("SGLang", _share),
    "--max-model-len": Neighbour("vLLM", _to("--context")),
    "--context-length": Neighbour("SGLang", _to("--context")),
    "--ctx-size": Neighbour("llama.cpp", _to("--context")),
    "--n-ctx": Neighbour("llama.cpp", _to("--context")),
    "--num-ctx": Neighbour("ollama", _to("--context")),
    "--max-seq-len": Neighbour("TensorRT-LLM", _to("--context")),
    "-c": Neighbour("llama.cpp", _to("--context")),
    "--max-num-seqs": Neighbour("vLLM", _to("--concurrency")),
    "--max-running-requests": Neighbour("SGLang", _to("--concurrency")),
    "--parallel": Neighbour("llama.cpp", _to("--concurrency")),
    "-np": Neighbour("llama.cpp", _to("--concurrency")),
    "--batch-size": Neighbour("other tools", _to("--concurrency")),
    "-ngl": Neighbour("llama.cpp", _nothing, _PLANNED),
    "--n-gpu-layers": Neighbour("llama.cpp", _nothing, _PLANNED),
    "--gpu-layers": Neighbour("llama.cpp", _nothing, _PLANNED),
    "--num-gpu": Neighbour("ollama", _nothing, _PLANNED),
    "--device-map": Neighbour("transformers", _nothing, _PLANNED),
    "--cpu-offload-gb": Neighbour("vLLM", _gib("--host-memory")),
    "--swap-space": Neighbour("vLLM", _nothing, "preempted requests are computed again, so there is no swap space"),
    "--load-in-4bit": Neighbour("transformers", lambda _: ["--weights", "nf4"], takes=False),
    "--load_in_4bit": Neighbour("transformers", lambda _: ["--weights", "nf4"], takes=False),
    "--load-in-8bit": Neighbour("transformers", lambda _: ["--weights", "int8"], takes=False),
    "--load_in_8bit": Neighbour("transformers", lambda _: ["--weights", "int8"], takes=False),
    "--dtype": Neighbour("vLLM and transformers", _weights),
    "--torch-dtype": Neighbour("transformers", _weights),
    "--quantization": Neighbour("vLLM", _weights),
    "-ctk": Neighbour("llama.cpp", lambda value: ["--kv-store", _STORES.get(value, value)]),
    "-ctv": Neighbour("llama.cpp", lambda value: ["--kv-store", _STORES.get(value, value)]),
    "--cache-type-k": Neighbour("llama.cpp", lambda value: ["--kv-store", _STORES.get(value, value)]),
    "--cache-type-v": Neighbour("llama.cpp", lambda value: ["--kv-store", _STORES.get(value, value)]),
    "-fa": Neighbour("llama.cpp", _nothing, "the planner chooses the attention kernel; --attention flash fixes it", takes=False),
    "--flash-attn": Neighbour("llama.cpp", _nothing, "the planner chooses the attention kernel; --attention flash fixes it", takes=False),
    "--attn-implementation": Neighbour("transformers", _to("--attention")),
    "--attention-backend": Neighbour("vLLM and SGLang", _to("--attention")),
    "--enable-prefix-caching": Neighbour("vLLM", lambda _: ["--prefix-sharing"], takes=False),
    "--no-enable-prefix-caching": Neighbour("vLLM", lambda _: ["--no-prefix-sharing"], takes=False),
    "--disable-radix-cache": Neighbour("SGLang", lambda _: ["--no-prefix-sharing"], takes=False),
    "--enforce-eager": Neighbour("vLLM", _nothing, "there is no graph to turn off on this command", takes=False),
    "--trust-remote-code": Neighbour("vLLM and transformers", _nothing, "code from a model's repository is never run here", takes=False),
    "--max-new-tokens": Neighbour("transformers", _to("--max-tokens")),
    "--max_new_tokens": Neighbour("transformers", _to("--max-tokens")),
    "--n-predict": Neighbour("llama.cpp", _to("--max-tokens")),
    "--num-predict": Neighbour("ollama", _to("--max-tokens")),
    "--model": Neighbour("vLLM and llama.cpp", _positional),
    "--model-path": Neighbour("SGLang", _positional),
    "-hf": Neighbour("llama.cpp", _positional),
    "--hf-repo": Neighbour("llama.cpp", _positional),
    "-p": Neighbour("llama.cpp", _positional),
    "--tensor-parallel-size": Neighbour("vLLM", lambda value: ["--device", f"{value}x NAME"]),
    "-tp": Neighbour("vLLM", lambda value: ["--device", f"{value}x NAME"]),
    "--tp-size": Neighbour("SGLang", lambda value: ["--device", f"{value}x NAME"]),
    "--tp": Neighbour("SGLang", lambda value: ["--device", f"{value}x NAME"]),
}  # fmt: skip


def check_neighbours(command: str, arguments: Sequence[str], own: Collection[str]) -> None:
    """Raises InputError, with the command to run instead, where `arguments` hold a flag of another tool that this command (flags `own`) does not have."""
    better, said = [], []
    words = list(arguments)
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word == "--":
            better += [word, *words[position:]]
            break
        name, _, attached = word.partition("=")
        if word == "-m" and "-m" in own and position < len(words) and _is_model(words[position]):
            said.append("-m is llama.cpp's for the model; here the model is an argument, and -m is short for --memory")
            better.append(words[position])
            position += 1
            continue
        foreign = NEIGHBOURS.get(name)
        if foreign is None or name in own:
            better.append(word)
            continue
        value = attached
        if foreign.takes and not attached and position < len(words) and not words[position].startswith("--"):
            value = words[position]
            position += 1
        assert foreign.here is not None, f"{name} has no translation"
        here = foreign.here(value)
        if here and here[0].startswith("-") and here[0] not in own:
            said.append(f"{name} is a flag of {foreign.tool}; `tradespace {command}` has nothing like it")
            continue
        said.append(f"{name} is a flag of {foreign.tool}" + (f"; {foreign.why}" if foreign.why else f"; here it is {' '.join(here) or 'not needed'}"))
        better += here
    if said:
        raise InputError(f"{'. '.join(said)}. Did you mean: tradespace {command} {shlex.join(better)}".rstrip())


def _is_model(value: str) -> bool:
    return value.endswith(".gguf") or "/" in value
