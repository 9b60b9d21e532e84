"""How a student is read in experiment distill-student: against its teacher on held-out text, rounded to int4, and as the engine decodes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tradespace.build_training import build_model
from tradespace.formats import decode
from tradespace.kernels.view import StepBatch, positions_of
from tradespace.loading.resolve import ModelFiles
from tradespace.model.transformer import Transformer
from tradespace.quantize.rtn import round_to_nearest
from tradespace.spec.formats import FORMATS
from tradespace.spec.tensors import model_tensors
from tradespace.spec.weights import WeightPlan
from tradespace.train.data import Document, pack
from tradespace.tuning_models import copy_tokenizer, save_model

INT4 = WeightPlan(default="int4-g64", exceptions={"embed": "int8"})
PROMPT = "It was the best of times, it was the worst of times, it was the age of wisdom"
DECODED, ROUNDS, MODEL_S = 128, 5, 15.0  # tokens of a round; rounds; seconds after which no round of a model begins
PROMPT_TOKENS = 24  # that the prompt takes at the most


@torch.no_grad()
def against_teacher(model: Transformer, teacher: Transformer, tokens: Sequence[int], context: int, device: torch.device) -> tuple[float, float]:
    """(share of positions whose likeliest token is the teacher's, mean KL divergence from the teacher in nats)."""
    data = pack([Document(list(tokens))], context)
    same = divergence = count = 0.0
    for start in range(0, len(data), 4):
        micro = data.micro_batch(range(start, min(start + 4, len(data))), device)
        batch = StepBatch.packed([span.length for span in micro.batch.spans], device=device)
        positions = positions_of(batch.spans, device=device)
        theirs, ours = (each.logits(each(micro.tokens_T, positions, batch)).float().log_softmax(dim=-1) for each in (teacher, model))
        same += float((theirs.argmax(-1) == ours.argmax(-1)).sum())
        divergence += float((theirs.exp() * (theirs - ours)).sum())
        count += len(theirs)
    return same / count, divergence / count


@torch.no_grad()
def rounded(model: Transformer, plan: WeightPlan, context: int, device: torch.device) -> Transformer:
    """The same with every weight as `plan`'s codes stand for it, held as floats: what the codes cost in quality, whatever multiplies them."""
    found = build_model(model.spec, model.plan, context=context, device=device)
    held = dict(model.named_parameters())
    for tensor in model_tensors(model.spec):
        values = held[tensor.name].detach()
        name = plan.format_of(tensor).name
        if tensor.role != "norm" and FORMATS[name].bits < 16:
            values = decode(name, round_to_nearest(name, values.float().cpu(), search=True))
        found.get_parameter(tensor.name).data.copy_(values)
    return found.eval()


def written(model: Transformer, tokenizer: ModelFiles, folder: Path) -> tuple[Path, Path]:
    """The student as folders that the engine opens: in bf16, and in int4 with its embedding in int8."""
    from tradespace.quantizing import quantize

    dense, coded = folder / "student-bf16", folder / "student-int4"
    if not (dense / "config.json").is_file():
        save_model(model, dense, dtype=torch.bfloat16)
        copy_tokenizer(tokenizer, dense)
    if not (coded / "config.json").is_file():
        quantize(dense, coded, format="int4-g64", embed="int8", method="rtn-search")
    return dense, coded


def decode_speeds(models: dict[str, str], device: str, context: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Tokens a second of one greedy sequence through the engine on `device`, the models in turn. One that does not run there says why in its row."""
    import tradespace as ts

    rows: list[dict[str, Any]] = []
    for name, path in models.items():
        began = time.monotonic()
        row: dict[str, Any] = {"part": "speed", "model": name, "device": device}
        try:
            with ts.open(path, device=device, context=context, concurrency=1, offline=True) as llm:
                params = llm.sampling(max_tokens=min(DECODED, context - PROMPT_TOKENS), temperature=0.0, ignore_eos=True)
                speeds: list[float] = []
                llm.generate(PROMPT, params)
                ready = time.monotonic()
                while len(speeds) < ROUNDS and (not speeds or time.monotonic() - ready < MODEL_S):
                    llm.generate(PROMPT, params)
                    speed = llm.speeds.decode_tokens_per_s
                    assert speed is not None, "it decoded"
                    speeds.append(speed)
                row |= {"tokens_per_s": median(speeds), "speeds": speeds, "weight_bytes": sum(llm.weight_bytes().values()), "plan": llm.plan.describe()}
        except Exception as error:  # whatever it is: the trainings before it took minutes of a device, and their record is to be written
            row["not_run"] = f"{type(error).__name__}: {error}"
        rows.append(row)
        say(f"{name} on {device}: {row.get('not_run') or format(row['tokens_per_s'], ',.0f') + ' tok/s'} ({time.monotonic() - began:.0f} s)")
    return rows
