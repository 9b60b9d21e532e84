"""What all exports share: the result's shape, and the notes on what no other tool takes from a plan."""

from __future__ import annotations

from dataclasses import dataclass

from tradespace.planner.candidate import Candidate

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, kw_only=True)
class Export:
    """`text` is what to run or to save (as `file_name`, where it is a file); `notes`: what of the plan it leaves out, a line each."""

    tool: str
    text: str
    arguments: tuple[str, ...] = ()  # of a command line, without the program
    file_name: str = ""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        return {"tool": self.tool, "text": self.text, "arguments": list(self.arguments), "file_name": self.file_name, "notes": list(self.notes)}


def command(program: str, arguments: list[str]) -> str:
    """A shell line, broken before every flag."""
    lines, line = [], program
    for argument in arguments:
        if argument.startswith("-"):
            lines.append(line)
            line = f"    {argument}"
        else:
            line += f" {_quoted(argument)}"
    return " \\\n".join([*lines, line])


def _quoted(argument: str) -> str:
    return argument if argument.replace("-", "").replace("_", "").replace(".", "").replace("/", "").replace(":", "").isalnum() else f"'{argument}'"


def memory_share(candidate: Candidate) -> str:
    """The budget as a share of the device's memory, rounded down to hundredths."""
    question = candidate.question
    return f"{max(1, int(100 * question.memory_bytes / question.device.memory_bytes)) / 100:.2f}"


def streamed_gib(candidate: Candidate) -> str:
    """Weights outside of one device, in GiB."""
    return f"{candidate.host_bytes / candidate.tensor_parallel / 2**30:.1f}"


def common_notes(candidate: Candidate, tool: str) -> list[str]:
    """What none of the tools takes from a plan."""
    notes = []
    if candidate.weights.exceptions:
        notes.append(f"mixed formats ({candidate.weights.describe()}): {tool} takes one for all, or a checkpoint that holds them so")
    if candidate.kv.retain.kind != "full":
        notes.append(f"KV retention {candidate.kv.retain.describe()}: {tool} keeps the whole past")
    if candidate.kv.value_store != candidate.kv.store:
        notes.append(f"values held apart from keys ({candidate.kv.describe_store()}): not expressed")
    if candidate.question.model.imposed:
        notes.append(f"the imposed attention pattern {candidate.question.model.imposed}: {tool} runs the model's own")
    if candidate.placement.streamed_layers and candidate.placement.stream_from == "disk":
        notes.append(f"{candidate.placement.streamed_layers} layers streamed from disk: {tool} does not read weights from disk at every step")
    return notes
