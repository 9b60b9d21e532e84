"""The engines that a benchmark knows, in one visible table: ours, and the peers that are compared with it where they are installed.

One file a peer. It imports nothing heavy at its top, and offers

    variants(task) -> {name: settings}      settings worth trying, the peer's own defaults first: its best for the task is what is compared
    Session(task, settings)                 opens the model; settings is one of the variants'
        .measure(prompts, tokens) -> {"prefill_s", "decode_s"}   all prompts (lists of token ids) up to their first tokens, then `tokens` more for each
        .facts() -> {name: text}            what the record says of it beside its version

A new peer is a file and a line here; what is timed, when, and what is made of it is `rounds`' business.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol

from tradespace.lab.bench.task import Task


@dataclass(frozen=True, kw_only=True)
class Peer:
    """module: beside this file. needs: the module that it imports, of `distribution`. reads: "any" as given, "gguf" such files alone, "floats" a folder of bf16
    safetensors, which is made of a GGUF file. dtype: what its products are computed in; "": the file's. on_devices: whether it is driven on a CUDA device,
    too."""

    name: str
    module: str
    needs: str
    distribution: str
    reads: Literal["any", "gguf", "floats"]
    dtype: str = ""
    on_devices: bool = False

    @property
    def full_module(self) -> str:
        return f"{__name__}.{self.module}"

    @property
    def version(self) -> str:
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "unknown: not installed as a package"

    def absent(self, task: Task) -> str | None:
        """Why it cannot take part, None: it can try."""
        if importlib.util.find_spec(self.needs) is None:
            return f"not installed (pip install {self.distribution})"
        if task.device != "cpu" and not self.on_devices:
            return "it is driven on the CPU alone here"
        if self.reads == "gguf" and not task.path.endswith(".gguf"):
            return "it reads GGUF files, and this is a folder of safetensors"
        return None

    def variants(self, task: Task) -> dict[str, dict[str, Any]]:
        return import_module(self.full_module).variants(task)


class Session(Protocol):
    """A peer with its model open, in a process of its own."""

    def measure(self, prompts: list[list[int]], tokens: int) -> dict[str, float]: ...

    def facts(self) -> dict[str, str | int]: ...


OURS = Peer(name="tradespace", module="ours", needs="torch", distribution="tradespace", reads="any", on_devices=True)
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(name="llama.cpp", module="llama_cpp", needs="llama_cpp", distribution="llama-cpp-python", reads="gguf", on_devices=True),
        Peer(name="openvino", module="openvino", needs="openvino_genai", distribution="openvino-genai", reads="gguf"),
        Peer(name="transformers", module="hugging_face", needs="transformers", distribution="transformers", reads="floats", dtype="bf16", on_devices=True),
    )
}
