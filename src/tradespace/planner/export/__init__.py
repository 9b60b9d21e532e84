"""A plan in another tool's words: its command line or configuration, and a line for every part of the plan that it cannot express.

One file a tool, one table of tools. Each file is a function from a `Candidate` and the name that the tool will load the model under to an `Export`.
Nothing is dropped in silence: what has no flag there becomes a note.
"""

from __future__ import annotations

from collections.abc import Callable

from tradespace.errors import InputError
from tradespace.planner.candidate import Candidate
from tradespace.planner.export import llama_cpp, ollama, sglang, transformers, trl, vllm
from tradespace.planner.export.parts import Export

EXPORTERS: dict[str, Callable[[Candidate, str], Export]] = {
    "vllm": vllm.export,
    "sglang": sglang.export,
    "llama.cpp": llama_cpp.export,
    "ollama": ollama.export,
    "transformers": transformers.export,
    "trl": trl.export,
}


def export(candidate: Candidate, tool: str, model: str) -> Export:
    """The plan for `tool`, which loads the model under the name `model`. Raises InputError for a tool that is not in EXPORTERS."""
    if tool not in EXPORTERS:
        raise InputError(f"no export for '{tool}'. Known: {', '.join(EXPORTERS)}")
    return EXPORTERS[tool](candidate, model)


__all__ = ["EXPORTERS", "Export", "export"]
