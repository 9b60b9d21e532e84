"""What a task has to move and to compute: counted from the file, the same for every engine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tradespace import api
from tradespace.cost.summary import cache_token_bytes, summarize
from tradespace.cost.traffic import attention_flops, cache_read_bytes, causal_pairs
from tradespace.lab.bench.task import Task
from tradespace.loading.gguf import read_gguf
from tradespace.loading.resolve import resolve
from tradespace.loading.safetensors import read_sharded

CACHE_STORE = "fp16"  # what every engine here keeps keys and values in; one that keeps less moves less than is counted
FLOAT_TYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a task has to do. read_bytes: of a step (all sequences); flops: of a timed token, of which the matrices' arithmetic is `dtype`'s."""

    weight_bytes: int
    read_bytes: float
    tokens_per_read: int
    flops_per_token: float
    dtype: str
    vocabulary: int

    @property
    def bytes_per_token(self) -> float:
        return self.read_bytes / self.tokens_per_read


def work_of(task: Task) -> Work:
    """Bytes and operations of `task`: every stored weight once a step (of an embedding that is no head, a row a token), keys and values as far back as each
    layer looks at the middle of what is timed, causal pairs for a prompt, logits of its last token alone."""
    files = resolve(task.path, download=False)
    spec = api.spec_of_files(files)
    summary = summarize(spec)
    weights, embedding, largest = _stored_bytes(files.weights[0] if files.kind == "gguf" else files.folder)
    read_weights = weights if spec.tied else weights - embedding + task.sequences * embedding // spec.V
    if task.kind == "prefill":
        body = summary.active_parameters - summary.head_parameters
        flops = 2 * (body * task.prompt + summary.head_parameters) + attention_flops(summary, lambda window: causal_pairs(task.prompt, window))
        read, tokens, per_token = float(read_weights), task.prompt, flops / task.prompt
    else:
        length = task.prompt + task.tokens / 2
        read = read_weights + task.sequences * cache_read_bytes(cache_token_bytes(summary, CACHE_STORE), length)
        tokens = task.sequences
        per_token = 2 * summary.active_parameters + attention_flops(summary, lambda window: min(length, window or length))
    dtype = "bf16" if largest in FLOAT_TYPES or task.device != "cpu" else "int8"  # a device decodes what it multiplies
    return Work(weight_bytes=weights, read_bytes=read, tokens_per_read=tokens, flops_per_token=per_token, dtype=dtype, vocabulary=spec.V)


def _stored_bytes(path: Path) -> tuple[int, int, str]:
    """(bytes of all tensors, of the embedding, the type that most of them have) of a GGUF file or a folder of safetensors."""
    if path.is_file():
        sizes = {name: (tensor.type_name, tensor.nbytes) for name, tensor in read_gguf(path).tensors.items()}
    else:
        sizes = {name: (tensor.dtype, tensor.nbytes) for name, tensor in read_sharded(path).tensors.items()}
    by_type: Counter[str] = Counter()
    for type_name, nbytes in sizes.values():
        by_type[type_name] += nbytes
    embedding = sum(nbytes for name, (_, nbytes) in sizes.items() if name in ("token_embd.weight", "model.embed_tokens.weight"))
    return sum(by_type.values()), embedding, by_type.most_common(1)[0][0]
