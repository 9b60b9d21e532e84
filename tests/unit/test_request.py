"""What a request may ask for, and when its output ends."""

import subprocess
import sys

import pytest

from tradespace.engine.request import Completion, Request, SamplingParams, Timings, accept_tokens
from tradespace.errors import InputError


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; at least 1"),
        ({"max_tokens": True}, "whole number"),
        ({"max_tokens": 3.0}, "whole number"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "finite"),
        ({"temperature": 1e-9}, "0 for greedy"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_p": 0}, "keeps no token"),
        ({"top_p": 1.01}, "between 0 and 1"),
        ({"min_p": -0.5}, "between 0 and 1"),
        ({"repetition_penalty": 0}, "1 means no penalty"),
        ({"presence_penalty": 3}, "between -2 and 2"),
        ({"frequency_penalty": -3}, "between -2 and 2"),
        ({"logit_bias": {-1: 1.0}}, "token id"),
        ({"logit_bias": {1: float("inf")}}, "finite"),
        ({"seed": "7"}, "whole number"),
        ({"seed": 2**64}, "seed is"),
        ({"stop": ("",)}, "at least one character"),
        ({"stop_token_ids": (-4,)}, "stop_token_ids"),
        ({"logprobs": 21}, "between 0 and 20"),
        ({"min_tokens": 5, "max_tokens": 4}, "between 0 and 4"),
        ({"n": 0}, "n is 0; at least 1"),
        ({"n": 1.0}, "whole number"),
        ({"n": True}, "whole number"),
    ],
)
def test_wrong_parameters_are_named(wrong, says):
    with pytest.raises(InputError, match=says):
        SamplingParams(**wrong)


def test_a_fork_goes_on_from_the_same_tokens_with_another_number():
    first = request(n=3, seed=4)
    first.token_ids.append(8)
    forks = [first.fork(), first.fork()]
    forks.append(forks[0].fork())
    assert [fork.sample for fork in forks] == [1, 2, 3] and [fork.id for fork in forks] == ["a.1", "a.2", "a.3"]
    assert all(fork.token_ids == [1, 2, 3, 8] and fork.seed == 4 and fork.root is first for fork in forks)
    forks[0].token_ids.append(9)
    assert first.token_ids == [1, 2, 3, 8]


def test_unknown_parameters_are_not_swallowed():
    with pytest.raises(TypeError):
        SamplingParams(temprature=0.5)  # pyright: ignore[reportCallIssue]


def test_what_is_given_is_copied_and_frozen():
    bias = {3: 1.0}
    params = SamplingParams(logit_bias=bias, stop="END", stop_token_ids=[4])  # pyright: ignore[reportArgumentType]
    bias[5] = 2.0
    assert dict(params.logit_bias) == {3: 1.0}
    assert params.stop == ("END",) and params.stop_token_ids == (4,)
    with pytest.raises(TypeError):
        params.logit_bias[6] = 1.0  # pyright: ignore[reportIndexIssue]


def test_an_empty_prompt_is_refused():
    with pytest.raises(InputError, match="empty"):
        Request(id="a", prompt_ids=())


def request(**params) -> Request:
    return Request(id="a", prompt_ids=(1, 2, 3), params=SamplingParams(**params), eos_ids=frozenset({9}))


@pytest.mark.parametrize(
    ("params", "sampled", "accepted", "reason"),
    [
        ({"max_tokens": 10}, [4, 5], [4, 5], None),
        ({"max_tokens": 2}, [4, 5, 6], [4, 5], "length"),
        ({"max_tokens": 10}, [4, 9, 6], [4, 9], "stop"),
        ({"max_tokens": 10, "ignore_eos": True}, [4, 9, 6], [4, 9, 6], None),
        ({"max_tokens": 10, "stop_token_ids": (5,), "ignore_eos": True}, [4, 5], [4, 5], "stop"),
        ({"max_tokens": 2}, [4, 9], [4, 9], "stop"),
    ],
)
def test_where_an_output_ends(params, sampled, accepted, reason):
    assert accept_tokens(request(**params), sampled) == (accepted, reason)


def test_seeds_are_kept_or_drawn():
    assert request(seed=7).seed == 7
    assert request().seed != request().seed


def test_the_last_token_needs_no_slot():
    assert request(max_tokens=5).max_cached == 7


def test_timings():
    timings = Timings(arrived_s=1.0, scheduled_s=2.0, first_token_s=4.0, finished_s=10.0)
    assert timings.ttft_s == 3.0
    assert timings.tpot_s(4) == 2.0
    assert timings.tpot_s(1) is None
    assert timings.prefill_tokens_per_s(8) == 4.0
    assert Timings().ttft_s is None


def test_a_completion_is_of_a_finished_request():
    with pytest.raises(AssertionError):
        Completion.of(request())


def test_the_planning_side_of_the_engine_knows_no_torch():
    code = "import sys; import tradespace.engine.scheduler; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False, env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
    assert subprocess.run([sys.executable, "-c", code.replace("scheduler", "runner")], check=False, env={"PYTHONPATH": ":".join(sys.path)}).returncode != 0
