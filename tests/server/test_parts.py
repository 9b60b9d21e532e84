"""The server's parts that need neither HTTP nor an engine: fairness, nesting, keys."""

from __future__ import annotations

import pytest
import torch

from tradespace.server.admission import Admission, QueueFull
from tradespace.server.constraints import GrammarState
from tradespace.server.limits import ApiKeys, depth_of


def test_a_late_client_waits_for_one_place_not_for_all_who_came_before():
    queue: Admission[str] = Admission(places=1, max_queue=300)
    for index in range(200):
        queue.add(f"many{index}", key="many")
    (first,) = queue.take()
    queue.add("single", key="one")
    order = []
    queue.done(first)
    for _ in range(2):
        (job,) = queue.take()
        order.append(job)
        queue.done(job)
    assert "single" in order and queue.num_waiting == 199 - 1


def test_a_full_queue_says_when_to_try_again():
    queue: Admission[str] = Admission(places=1, max_queue=1)
    queue.add("a", key="k")
    with pytest.raises(QueueFull) as caught:
        queue.add("b", key="k")
    assert caught.value.retry_s >= 1


def test_one_that_is_given_up_while_it_waits_leaves_no_trace():
    queue: Admission[str] = Admission(places=1, max_queue=8)
    queue.add("a", key="k")
    queue.done("a")
    assert queue.num_waiting == 0 and not list(queue.take())


def test_nesting_is_counted_outside_of_strings_only():
    assert depth_of(b'{"a": "[[[[\\"[[", "b": [1]}', 64) == 2
    assert depth_of(b"[" * 100, 64) == 65


def test_only_a_known_bearer_key_opens():
    keys = ApiKeys(("secret",))
    assert keys.holds("Bearer secret") and not keys.holds("Bearer secre") and not keys.holds("Basic secret") and not keys.holds("")


@pytest.mark.parametrize("width", [100, 150])  # beyond the mask's 128: rows that are no tokens
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_leaves_what_may_come_and_nothing_else(dtype, width):
    class Matcher:
        def is_terminated(self):
            return False

        def fill_next_token_bitmask(self, bitmask):
            bitmask.copy_(words)

    draw = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31 - 1, (1, 4), generator=draw).int()
    logits = torch.randn(2, width, generator=draw).to(dtype)
    changed = logits.clone()
    GrammarState(Matcher(), torch.empty(1, 4, dtype=torch.int32)).allow_(changed[1])
    allowed = [token < 128 and bool(int(words[0, token // 32]) >> token % 32 & 1) for token in range(width)]
    assert torch.equal(changed[0], logits[0])
    assert torch.equal(changed[1], logits[1].masked_fill(~torch.tensor(allowed), -torch.inf))
