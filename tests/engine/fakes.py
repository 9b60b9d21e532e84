"""The hash machine as a model with tensors: what it knows of a context it has read through block tables and slots. And a tokenizer of a few pieces."""

import random
from types import SimpleNamespace

import torch

from tradespace.engine.engine import Engine
from tradespace.engine.runner import Runner
from tradespace.engine.sampler import Sampler
from tradespace.engine.scheduler import Scheduler
from tradespace.kernels.sample.noise import gumbel
from tradespace.spec.kv import KVPlan
from tradespace.spec.plan import Plan

V = 31


class Slots:
    """A cache of one number a token, as much of it as the hash machine and the runner need."""

    def __init__(self, num_blocks: int, block_size: int):
        self.slots = torch.full((num_blocks * block_size,), -1)
        self.blocks = self.slots.view(num_blocks, block_size)

    def copy_blocks(self, pairs):
        sources, targets = map(list, zip(*pairs, strict=True))
        self.blocks[targets] = self.blocks[sources]


class HashModel:
    """Logits are a function of the whole context, read back from the cache: a wrong slot, table, length or position changes them."""

    def __init__(self, block_size: int):
        self.spec = SimpleNamespace(V=V)
        self.block_size = block_size
        self.fail_at: set[int] = set()
        self.raises: BaseException | None = None
        self.steps = 0

    def forward(self, tokens_T, positions_T, batch, cache):
        self.steps += 1
        if self.raises is not None:
            raised, self.raises = self.raises, None
            raise raised
        cache.slots[batch.slots_T] = tokens_T * 1_000_003 + positions_T
        hidden = []
        for index in range(len(batch.lengths_B)):
            first, last = batch.query_starts_B1[index : index + 2].tolist()
            length = int(batch.lengths_B[index])
            table = batch.block_tables_BM[index].tolist()
            slots = [table[p // self.block_size] * self.block_size + p % self.block_size for p in range(length)]
            held = cache.slots[torch.tensor(slots)].tolist()
            assert positions_T[first:last].tolist() == list(range(length - (last - first), length))
            hidden += [hash(tuple(held[: length - (last - first) + row + 1])) for row in range(last - first)]
        return torch.tensor(hidden)[:, None]

    def logits(self, hidden_TD, rows):
        logits_RV = (2 * gumbel(hidden_TD[rows], torch.arange(V)[None, :])).float()
        for row in self.fail_at:
            logits_RV[row] = torch.nan
        self.fail_at = set()
        return logits_RV


PIECES = ["", "a", "b", "c", "ab", "bc", "abc", " ", "é", "stop", "st", "op", "\n", "x", "y", "z", *(chr(0x41 + i) for i in range(15))]
assert len(PIECES) == V


class Pieces:
    """A tokenizer whose token i is PIECES[i]; 0 ends an output."""

    eos_ids = frozenset({0})

    def encode(self, text: str) -> list[int]:
        return [PIECES.index(char) for char in text]

    def stream_decoder(self):
        return self

    def push(self, token_id: int) -> str:
        return PIECES[token_id]

    def flush(self) -> str:
        return ""


def plan_of(**changes) -> Plan:
    kv = KVPlan(**{name: changes.pop(name) for name in ("layout", "block_size", "prefix_sharing") if name in changes})
    return Plan(**{"model": "hash", "kv": kv, "max_sequences": 8, "max_context": 64, "step_tokens": 32, "kv_tokens": 8 * 64, **changes})


def hash_engine(*, tokenizer=None, drafter=None, policy="continuous", drafts=0, eos_ids=(), **changes) -> Engine:
    plan = plan_of(**{"speculation": drafts, "block_size": 4, **changes})
    scheduler = Scheduler.from_plan(plan, policy=policy)
    model = HashModel(scheduler.block_size)
    cache = Slots(scheduler.allocator.num_blocks, scheduler.block_size)
    return Engine(Runner(model, cache, plan), scheduler, Sampler(), tokenizer, drafter=drafter, eos_ids=eos_ids)


class AnyDrafter:
    """Guesses that are right, wrong or partly right, from the answers that a run without drafts gave."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]], wrong: float):
        self.answers, self.wrong, self.random = answers, wrong, random.Random(1)

    def propose(self, request):
        ahead = self.answers[request.prompt_ids][request.num_outputs : request.num_outputs + 5]
        return [self.random.randrange(V) if self.random.random() < self.wrong else token for token in ahead]
