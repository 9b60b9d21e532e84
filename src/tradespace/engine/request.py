"""What a caller asks for and what becomes of it: `SamplingParams`, `Request`, `Completion`. No torch; every name is vLLM's where vLLM has one."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from types import MappingProxyType
from typing import Any, Literal, Protocol

from tradespace.errors import EngineError, InputError

FinishReason = Literal["stop", "length", "abort", "error"]
State = Literal["waiting", "running", "finished"]

MAX_LOGPROBS = 20
# a smaller temperature than this is greedy in all but name, and dividing fp32 logits by it overflows
MIN_TEMPERATURE = 1e-4


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. Order of work: logit bias, min_tokens, penalties, temperature, top-k, top-p, min-p, draw.

    max_tokens            most tokens to generate
    temperature           divides the logits; 0 is greedy
    top_k                 keep the k most likely tokens; 0 or -1: all
    top_p                 keep the fewest most likely tokens that hold this probability together (arXiv:1904.09751)
    min_p                 keep tokens of at least this share of the most likely one's probability (arXiv:2407.01082)
    repetition_penalty    divides positive and multiplies negative logits of tokens in prompt or output (arXiv:1909.05858)
    presence_penalty      subtracted once from tokens in the output
    frequency_penalty     subtracted as often as the token stands in the output
    logit_bias            token id → what is added to its logit
    seed                  same seed, prompt and parameters: same tokens. None: drawn from the system
    stop                  strings that end the output; they are not part of it
    stop_token_ids        tokens that end the output, beside the model's own
    ignore_eos            the model's own end-of-sequence tokens do not end the output
    min_tokens            no stop token is chosen before so many tokens; stop strings are ignored until then
    logprobs              log-probabilities of the chosen token and of so many best ones, from the unmodified logits
    prompt_logprobs       the same for each token of the prompt but the first (row by row, so it costs time and no memory); its blocks are then computed anew
    adapter               name of the adapter that its tokens pass through, beside the model's weights; None: the model alone
    n                     outputs of one prompt, each with noise of its own; the prompt is computed once where prefixes are shared
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    adapter: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        self._check_numbers()
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InputError(f"stop holds {text!r}; every stop string needs at least one character")
        for token in self.stop_token_ids:
            _whole("stop_token_ids", token, 0, None)
        for token, bias in self.logit_bias.items():
            _whole("logit_bias: token id", token, 0, None)
            _real(f"logit_bias[{token}]", bias, float("-inf"), float("inf"))
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(self.logit_bias)))

    def _check_numbers(self) -> None:
        _whole("max_tokens", self.max_tokens, 1, None)
        _whole("n", self.n, 1, None)
        _whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        _whole("top_k", self.top_k, -1, None)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _whole("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**64 - 1)
        _real("temperature", self.temperature, 0, float("inf"))
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise InputError(f"temperature is {self.temperature}; give 0 for greedy, or at least {MIN_TEMPERATURE}")
        _real("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise InputError("top_p is 0, which keeps no token. Give a share above 0, or temperature 0 for greedy")
        _real("min_p", self.min_p, 0, 1)
        _real("repetition_penalty", self.repetition_penalty, 0, float("inf"))
        if self.repetition_penalty == 0:
            raise InputError("repetition_penalty is 0; it divides logits. 1 means no penalty")
        _real("presence_penalty", self.presence_penalty, -2, 2)
        _real("frequency_penalty", self.frequency_penalty, -2, 2)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def truncates(self) -> bool:
        """Whether some tokens cannot be drawn at all."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def _whole(name: str, value: Any, low: int, high: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{name} is {value!r}; a whole number is needed")
    if value < low or (high is not None and value > high):
        raise InputError(f"{name} is {value}; " + (f"at least {low} is needed" if high is None else f"it must lie between {low} and {high}"))


def _real(name: str, value: Any, low: float, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not isfinite(value):
        raise InputError(f"{name} is {value!r}; a finite number is needed")
    if not low <= value <= high:
        raise InputError(f"{name} is {value}; " + (f"at least {low:g} is needed" if high == float("inf") else f"it must lie between {low:g} and {high:g}"))


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the probabilities that the model itself gave (before bias, penalties, temperature and truncation; vLLM's raw_logprobs).

    `top` holds the best (token id, log-probability), best first; the chosen token need not be among them.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Constraint(Protocol):
    """What may follow what has been generated: a grammar's state. One for each request; nobody drafts for a request that has one."""

    def allow_(self, logits_V: Any) -> None:
        """-inf for every token that may not come next, in place."""
        ...

    def accept(self, token: int) -> bool:
        """Goes on past `token`. False: it may not come here."""
        ...

    def copy(self) -> Constraint:
        """Another one in the same state."""
        ...


@dataclass(slots=True)
class Timings:
    """Moments of a request on one monotonic clock, in seconds; None: not yet."""

    arrived_s: float | None = None
    scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: from arrival, so waiting counts."""
        return None if self.first_token_s is None or self.arrived_s is None else self.first_token_s - self.arrived_s

    def tpot_s(self, num_outputs: int) -> float | None:
        """Time per output token after the first."""
        if self.finished_s is None or self.first_token_s is None or num_outputs < 2:
            return None
        return (self.finished_s - self.first_token_s) / (num_outputs - 1)

    def prefill_tokens_per_s(self, num_prompt: int) -> float | None:
        """Prompt tokens over the time from the first step that held some of them to the first output token."""
        if self.first_token_s is None or self.scheduled_s is None or self.first_token_s <= self.scheduled_s:
            return None
        return num_prompt / (self.first_token_s - self.scheduled_s)


@dataclass(eq=False, kw_only=True)
class Request:
    """One sequence on its way. The scheduler owns `state`, `num_computed` and `blocks`; tokens are only ever appended.

    token_ids      prompt and output in one list: what a step takes its tokens from, whether they were given or generated
    num_computed   tokens whose keys and values are in the cache
    blocks         the cache blocks that hold them, in order
    seed           of the sampling noise: the parameters' own, or one drawn from the system
    root           the request that its family of forks began with, which counts them in `num_samples`
    sample         its number in the family, which the noise depends on
    siblings       the other outputs of a prompt with n > 1; only the first of them knows the others
    source         the request that it was forked from, until it begins
    block_names    of the full blocks that its tokens make, as far as somebody has asked (`sharing.py`)
    num_published  its first so many blocks can be found by their names
    num_cached     tokens whose keys and values it did not have to compute itself
    num_lost       tokens whose keys and values a preemption has cost it, and which have not been found again
    constraint     what its tokens must obey
    prompt_logprobs  of each token of the prompt, where they were asked for; the first one's, and those not computed yet, are None
    priority       lower goes first; equal ones go by arrival
    pieces         the output as text, as it became certain
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    eos_ids: frozenset[int] = frozenset()
    constraint: Constraint | None = field(default=None, repr=False)
    arrival: int = -1
    num_samples: int = 1
    sample: int = 0
    source: Request | None = field(default=None, repr=False)
    state: State = "waiting"
    token_ids: list[int] = field(init=False)
    num_computed: int = 0
    blocks: tuple[int, ...] = ()
    block_names: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_cached: int = 0
    num_lost: int = 0
    root: Request = field(init=False, repr=False)
    siblings: list[Request] = field(default_factory=list, repr=False)
    seed: int = field(init=False)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: EngineError | None = None
    num_preemptions: int = 0
    timings: Timings = field(default_factory=Timings)

    def __post_init__(self):
        self.prompt_ids = tuple(self.prompt_ids)
        if not self.prompt_ids:
            raise InputError("the prompt is empty: a request needs at least one token")
        self.token_ids = list(self.prompt_ids)
        self.seed = secrets.randbits(63) if self.params.seed is None else self.params.seed
        self.root = self
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * len(self.prompt_ids)

    @property
    def order(self) -> tuple[int, int, int]:
        """What the queues are sorted by. Forks stand behind the one that their family began with."""
        return self.priority, self.arrival, self.sample

    def fork(self) -> Request:
        """A request that goes on from the tokens that this one has now, with noise of its own. Nobody has scheduled it yet."""
        root = self.root
        forked = Request(
            id=f"{root.id}.{root.num_samples}", prompt_ids=self.prompt_ids, params=self.params, priority=self.priority, eos_ids=self.eos_ids, source=self
        )
        forked.arrival, forked.sample, forked.seed, forked.root = root.arrival, root.num_samples, root.seed, root
        root.num_samples += 1
        forked.token_ids, forked.logprobs = list(self.token_ids), list(self.logprobs)
        forked.prompt_logprobs = self.prompt_logprobs  # one prompt, one list
        forked.constraint = None if self.constraint is None else self.constraint.copy()
        return forked

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_outputs(self) -> int:
        return len(self.token_ids) - len(self.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt_ids) :]

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to be fed to the model before the next one can be sampled; 1 while decoding, 0 once the last one has been asked for."""
        return 0 if self.num_outputs >= self.params.max_tokens else len(self.token_ids) - self.num_computed

    @property
    def max_cached(self) -> int:
        """Most tokens that it will ever hold in the cache: the last one generated is never fed back."""
        return self.num_prompt + self.params.max_tokens - 1

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def finished(self) -> bool:
        return self.state == "finished"

    def stop_ids(self) -> frozenset[int]:
        """Tokens that end the output."""
        return frozenset(self.params.stop_token_ids) | (frozenset() if self.params.ignore_eos else self.eos_ids)

    def ends_with(self, token: int, num_outputs: int) -> FinishReason | None:
        """Why the output ends when `token` is its `num_outputs`-th token, or None. Stop strings are the engine's business."""
        if token in self.params.stop_token_ids or (token in self.eos_ids and not self.params.ignore_eos):
            return "stop"
        return "length" if num_outputs >= self.params.max_tokens else None


def accept_tokens(request: Request, sampled: Sequence[int]) -> tuple[list[int], FinishReason | None]:
    """As many of the tokens sampled in one step as belong to the output, and why it ends there, if it does."""
    accepted: list[int] = []
    for token in sampled:
        accepted.append(token)
        reason = request.ends_with(token, request.num_outputs + len(accepted))
        if reason is not None:
            return accepted, reason
    return accepted, None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A finished request. `output_ids` ends with the stop token, if one ended it; `text` does not.

    sample      its number among the outputs of the prompt; `siblings` holds the others for n > 1, `samples` all of them
    num_cached  tokens whose keys and values were found in the cache
    """

    id: str
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] = ()
    num_preemptions: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    prefill_tokens_per_s: float | None = None
    sample: int = 0
    num_cached: int = 0
    siblings: tuple[Completion, ...] = ()

    @property
    def samples(self) -> tuple[Completion, ...]:
        """All outputs of the prompt, this one first."""
        return (self, *self.siblings)

    @classmethod
    def of(cls, request: Request) -> Completion:
        assert request.finish_reason is not None, f"request {request.id} is {request.state}"
        return cls(
            id=request.id,
            prompt_ids=request.prompt_ids,
            output_ids=tuple(request.output_ids),
            text=request.text,
            finish_reason=request.finish_reason,
            logprobs=tuple(request.logprobs),
            num_preemptions=request.num_preemptions,
            ttft_s=request.timings.ttft_s,
            tpot_s=request.timings.tpot_s(request.num_outputs),
            prefill_tokens_per_s=request.timings.prefill_tokens_per_s(request.num_prompt - request.num_cached),
            sample=request.sample,
            num_cached=request.num_cached,
            siblings=tuple(cls.of(other) for other in request.siblings),
        )
