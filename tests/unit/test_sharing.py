"""Shared prefixes against the hash machine: tokens do not change, a shared block is never written into, nothing leaks; what is found, copied, counted."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.oracle import EOS, HashMachine, ScriptedDrafter, V, check_blocks, expected, run_step
from tradespace.engine.request import Request, SamplingParams
from tradespace.engine.scheduler import Scheduler
from tradespace.engine.sharing import extend_names
from tradespace.errors import InputError
from tradespace.spec.kv import KVPlan, Retain


def request_of(name: str, prompt: list[int], output: int, *, priority: int = 0, n: int = 1, eos: bool = False) -> Request:
    params = SamplingParams(max_tokens=output, temperature=0, n=n)
    return Request(id=name, prompt_ids=tuple(prompt), params=params, priority=priority, eos_ids=frozenset({EOS}) if eos else frozenset())


def tokens_of(count: int, seed: int = 0) -> list[int]:
    pick = random.Random(seed)
    return [pick.randrange(V) for _ in range(count)]


def scheduler_of(**changes) -> Scheduler:
    return Scheduler(**{"num_blocks": 24, "block_size": 4, "max_sequences": 6, "max_context": 64, "step_tokens": 16, "prefix_sharing": True, **changes})


def add_all(scheduler: Scheduler, *requests: Request) -> list[Request]:
    """Queues the requests, and the forks that n > 1 asks for."""
    family = []
    for request in requests:
        scheduler.add(request)
        family += [request, *(scheduler.fork(request) for _ in range(1, request.params.n))]
    return family


def drain(scheduler: Scheduler, machine: HashMachine, drafter: ScriptedDrafter | None = None) -> list:
    steps = []
    while scheduler.has_work:
        steps.append(run_step(scheduler, machine, drafter))
        assert len(steps) < 10_000, "no progress"
    assert scheduler.allocator.num_used == 0
    return steps


# ------------------------------------------------------------------------------------------------ names


def test_names_are_of_all_tokens_up_to_the_blocks_end():
    names: list[bytes] = []
    extend_names(names, [1, 2, 3, 4, 5], 2)
    assert len(names) == 2
    more = list(names)
    extend_names(more, [1, 2, 3, 4, 5, 6, 7], 2)
    assert more[:2] == names and len(more) == 3
    for other in ([9, 2, 3, 4], [1, 9, 3, 4], [1, 2, 3, 9], [3, 4, 1, 2]):
        found: list[bytes] = []
        extend_names(found, other, 2)
        assert found[1] != names[1]
    with_root: list[bytes] = []
    extend_names(with_root, [1, 2], 2, root=b"an adapter")
    assert with_root[0] != names[0]


# ------------------------------------------------------------------------------------------------ what is found


def test_a_second_request_begins_behind_the_first_ones_blocks():
    scheduler = scheduler_of(step_tokens=40)
    machine = HashMachine(scheduler)
    prefix = tokens_of(18)
    first, second = request_of("a", [*prefix, 1], 3), request_of("b", [*prefix, 2, 3], 3)
    add_all(scheduler, first)
    drain(scheduler, machine)
    assert scheduler.allocator.num_cached == 5 and scheduler.allocator.num_free == 24  # of 19 + 2 tokens
    add_all(scheduler, second)
    step = run_step(scheduler, machine)
    assert step.sequences[0].start == 16 and second.num_cached == 16
    assert (scheduler.counters.prefix_cache_queries, scheduler.counters.prefix_cache_hits) == (19 + 20, 16)
    drain(scheduler, machine)
    assert second.output_ids == expected(second)


@pytest.mark.parametrize(("length", "together"), [(16, False), (16, True), (1, False), (3, True), (4, False)])
def test_a_prompt_that_is_known_whole_computes_its_last_token_only(length, together):
    """Nobody else there: written over itself, in place. Another owner there: the block is copied first."""
    scheduler = scheduler_of(step_tokens=40)
    machine = HashMachine(scheduler)
    prompt = tokens_of(length)
    first, second = request_of("a", prompt, 9), request_of("b", prompt, 9)
    add_all(scheduler, first)
    if together:
        run_step(scheduler, machine)
    else:
        drain(scheduler, machine)
    add_all(scheduler, second)
    step = run_step(scheduler, machine)
    item = next(item for item in step.sequences if item.request is second)
    full = length // 4 * 4
    assert item.start == min(full, length - 1) and item.num_tokens == length - item.start
    assert len(step.copies) == (together and length == full > 0)
    drain(scheduler, machine)
    assert first.output_ids == second.output_ids == expected(first)


def test_many_at_once_compute_their_prefix_once():
    scheduler = scheduler_of(num_blocks=64, max_sequences=16, step_tokens=24)
    machine = HashMachine(scheduler)
    prefix = tokens_of(40)
    requests = add_all(scheduler, *(request_of(f"r{i}", [*prefix, i, i + 1], 4) for i in range(16)))
    most = 0
    computed = 0
    while scheduler.has_work:
        step = run_step(scheduler, machine)
        computed += sum(max(0, min(40, item.start + item.num_tokens) - item.start) for item in step.sequences)
        most = max(most, scheduler.allocator.num_used)
    assert computed == 40, "the prefix was computed more than once"
    assert 10 + 16 <= most <= 10 + 16 * 2  # the prefix's ten blocks, and two of its own for everyone
    assert all(request.output_ids == expected(request) for request in requests)
    assert scheduler.counters.prefix_cache_hits == 15 * 40


def test_the_least_recently_used_goes_first_and_ends_before_beginnings():
    scheduler = scheduler_of(num_blocks=12, step_tokens=64)
    machine = HashMachine(scheduler)
    old, new = tokens_of(16, seed=1), tokens_of(16, seed=2)
    for name, prompt in (("a", old), ("b", new), ("a again", old)):
        add_all(scheduler, request_of(name, prompt, 1))
        drain(scheduler, machine)
    assert scheduler.allocator.num_cached == 8
    add_all(scheduler, request_of("c", tokens_of(23, seed=3), 1))  # six blocks: four that are free, and two of b's
    drain(scheduler, machine)
    hits = scheduler.counters.prefix_cache_hits
    for name, prompt, found in (("a", old, 15), ("b", new, 8)):
        add_all(scheduler, request_of(name, prompt, 1))
        drain(scheduler, machine)
        assert scheduler.counters.prefix_cache_hits == hits + found
        hits += found


def test_a_preempted_request_finds_its_own_blocks_again():
    scheduler = scheduler_of(num_blocks=6, step_tokens=48, max_context=24)
    machine = HashMachine(scheduler)
    requests = add_all(scheduler, request_of("a", tokens_of(8, 1), 16), request_of("b", tokens_of(8, 2), 16))
    drain(scheduler, machine)
    assert scheduler.counters.preemptions == 1 and all(request.output_ids == expected(request) for request in requests)
    plain = scheduler_of(num_blocks=6, step_tokens=48, max_context=24, prefix_sharing=False)
    add_all(plain, request_of("a", tokens_of(8, 1), 16), request_of("b", tokens_of(8, 2), 16))
    drain(plain, HashMachine(plain))
    assert scheduler.counters.recomputed_tokens <= plain.counters.recomputed_tokens


def test_blocks_of_a_failed_request_are_not_found():
    scheduler = scheduler_of(step_tokens=40)
    machine = HashMachine(scheduler)
    first = request_of("a", tokens_of(20), 9)
    add_all(scheduler, first)
    run_step(scheduler, machine)
    scheduler.finish(first, "error")
    assert scheduler.allocator.num_cached == 0 and scheduler.allocator.num_free == 24
    add_all(scheduler, request_of("b", tokens_of(20), 2))
    drain(scheduler, machine)
    assert scheduler.counters.prefix_cache_hits == 0


def test_drafted_tokens_have_no_name_until_they_are_accepted():
    """Every draft is wrong: what they wrote lies behind the sequence's end, and nobody who looks for those tokens finds it."""
    scheduler = scheduler_of(max_drafts=4, step_tokens=40)
    machine = HashMachine(scheduler)
    request = request_of("a", tokens_of(7), 20)
    add_all(scheduler, request)
    drain(scheduler, machine, ScriptedDrafter(1.0))
    names: list[bytes] = []
    extend_names(names, request.token_ids[:-1], 4)
    assert set(scheduler.allocator._block_of) == set(names)


# ------------------------------------------------------------------------------------------------ forks


def test_samples_share_the_prompt_and_copy_its_last_block():
    scheduler = scheduler_of(num_blocks=32, step_tokens=40)
    machine = HashMachine(scheduler)
    family = add_all(scheduler, request_of("a", tokens_of(18), 5, n=4))
    assert [request.state for request in family] == ["waiting"] * 4
    run_step(scheduler, machine)
    step = run_step(scheduler, machine)
    # the first one's own next token goes first, into a copy; the last to write needs none
    assert [(item.request.id, item.start, item.num_tokens) for item in step.sequences] == [("a", 18, 1), *((f"a.{i}", 17, 1) for i in (1, 2, 3))]
    assert len(step.copies) == 3 and scheduler.allocator.num_used == 4 + 4
    drain(scheduler, machine)
    assert all(request.output_ids == expected(family[0]) for request in family)
    assert [request.num_cached for request in family] == [0, 17, 17, 17]


@pytest.mark.parametrize("n", [1, 3, 20])
@pytest.mark.parametrize("changes", [{}, {"prefix_sharing": False}, {"block_size": 1, "num_blocks": 64}, {"prefix_sharing": False, "block_size": 64}])
def test_more_samples_than_sequences(n, changes):
    scheduler = scheduler_of(max_sequences=3, **changes)
    family = add_all(scheduler, request_of("a", tokens_of(11), 7, n=n), request_of("b", tokens_of(3, 1), 2))
    drain(scheduler, HashMachine(scheduler))
    assert len(family) == n + 1 and all(request.output_ids == expected(request) for request in family)


def test_samples_go_before_those_who_came_later():
    scheduler = scheduler_of(max_sequences=2)
    add_all(scheduler, request_of("a", tokens_of(5), 4, n=3), request_of("b", tokens_of(5, 1), 4))
    assert [request.id for request in scheduler.waiting] == ["a", "a.1", "a.2", "b"]
    drain(scheduler, HashMachine(scheduler))


def test_a_fork_in_the_midst_of_an_output_begins_at_once_and_shares():
    scheduler = scheduler_of()
    machine = HashMachine(scheduler)
    first = request_of("a", tokens_of(10), 12)
    add_all(scheduler, first)
    for _ in range(4):
        run_step(scheduler, machine)
    fork = scheduler.fork(first)
    assert fork.state == "running" and fork.blocks == first.blocks and fork.output_ids == first.output_ids
    # what beam search does with the beam that fell out: its blocks stay with the fork
    scheduler.abort(first)
    check_blocks(scheduler)
    computed = sum(step.num_tokens for step in drain(scheduler, machine))
    assert fork.output_ids == expected(fork) and computed == 12 - 4
    with pytest.raises(InputError, match="has ended"):
        scheduler.fork(first)


def test_a_fork_of_a_full_house_waits_and_finds_what_is_left():
    scheduler = scheduler_of(max_sequences=1)
    machine = HashMachine(scheduler)
    first = request_of("a", tokens_of(10), 12)
    add_all(scheduler, first)
    run_step(scheduler, machine)
    fork = scheduler.fork(first)
    assert fork.state == "waiting" and not fork.blocks
    drain(scheduler, machine)
    assert fork.output_ids == expected(fork) and fork.num_cached == 8


def test_a_late_fork_never_falsifies_a_block_that_its_source_has_filled():
    """The source has gone on and filled the block that the fork begins in, under a name; the fork, by then its only owner, writes other tokens there."""
    scheduler = scheduler_of(max_sequences=1)
    machine = HashMachine(scheduler)
    first = request_of("a", tokens_of(9), 12)
    add_all(scheduler, first)
    run_step(scheduler, machine)
    fork = scheduler.fork(first)
    for _ in range(4):
        run_step(scheduler, machine)
    scheduler.max_sequences = 2
    fork.token_ids[-1] = (fork.token_ids[-1] + 1) % V  # another draw
    scheduler.step_tokens = 1  # it begins, but writes nothing yet
    assert scheduler._may_begin(fork)
    scheduler._admit()
    scheduler.abort(first)
    scheduler.step_tokens = 16
    drain(scheduler, machine)
    again = request_of("b", first.token_ids, 3)
    add_all(scheduler, again)
    drain(scheduler, machine)
    assert again.output_ids == expected(again)


# ------------------------------------------------------------------------------------------------ everything at once


families = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 20), st.integers(1, 14), st.integers(1, 12), st.sampled_from([1, 1, 1, 2, 4]), st.integers(0, 1)), max_size=8
)


@settings(max_examples=200, deadline=None)
@given(
    families=families,
    block_size=st.sampled_from([1, 3, 4, 16]),
    spare_blocks=st.integers(0, 20),
    max_sequences=st.integers(1, 6),
    step_tokens=st.integers(1, 40),
    max_drafts=st.integers(0, 4),
    wrong=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_tokens_do_not_depend_on_sharing(families, block_size, spare_blocks, max_sequences, step_tokens, max_drafts, wrong, seed):
    """Prompts of a few common beginnings, forks at the start and in the midst, caches down to the smallest that fits one."""
    scheduler = scheduler_of(
        num_blocks=48 // block_size + spare_blocks, block_size=block_size, max_sequences=max_sequences, step_tokens=step_tokens, max_drafts=max_drafts
    )
    pick, machine, drafter = random.Random(seed), HashMachine(scheduler), ScriptedDrafter(wrong, seed)
    requests = []
    for number, (beginning, common, own, output, n, priority) in enumerate(families):
        prompt = tokens_of(20, beginning)[:common] + tokens_of(own, 100 + pick.randrange(3))
        requests += add_all(scheduler, request_of(f"r{number}", prompt, output, priority=priority, n=n, eos=True))
        if pick.random() < 0.5:
            run_step(scheduler, machine, drafter)
        if scheduler.running and pick.random() < 0.3:
            requests.append(scheduler.fork(pick.choice(scheduler.running)))
            check_blocks(scheduler)
    drain(scheduler, machine, drafter)
    assert all(request.output_ids == expected(request) for request in requests)


def test_ten_thousand_arrivals_forks_aborts_and_preemptions_leak_nothing():
    """free + used == total, every block's owners counted, every token right, at every step."""
    pick = random.Random(5)
    scheduler = scheduler_of(num_blocks=16, max_sequences=8, step_tokens=24, max_drafts=3, max_context=48)
    machine, drafter = HashMachine(scheduler), ScriptedDrafter(0.4)
    made: list[Request] = []
    forks = 0
    while len(made) < 10_000 or scheduler.has_work:
        while len(made) < 10_000 and len(scheduler.waiting) < 4:
            prompt = tokens_of(12, pick.randrange(4))[: pick.randint(0, 12)] + tokens_of(pick.randint(1, 6), pick.randrange(50))
            n = pick.choice([1, 1, 1, 1, 3])
            made += add_all(scheduler, request_of(f"r{len(made)}", prompt, pick.randint(1, 24), priority=pick.choice([0, 0, 0, 1]), n=n))
            forks += n - 1
        run_step(scheduler, machine, drafter)
        if scheduler.running and pick.random() < 0.1:
            made.append(scheduler.fork(pick.choice([*scheduler.running, *scheduler.waiting])))
            forks += 1
            check_blocks(scheduler)
        if scheduler.has_work and pick.random() < 0.2:
            scheduler.abort(pick.choice([*scheduler.running, *scheduler.waiting]))
            check_blocks(scheduler)
    counters = scheduler.counters
    assert scheduler.allocator.num_used == 0 and not scheduler._live
    aborted = [request for request in made if request.finish_reason == "abort"]
    assert len(aborted) > 1000 and counters.preemptions > 300 and forks > 1000 and counters.copied_blocks > 300
    assert 0 < counters.prefix_cache_hits < counters.prefix_cache_queries and counters.recomputed_tokens >= 0
    for request in made:
        right = expected(request)
        assert request.output_ids == (right[: request.num_outputs] if request.finish_reason == "abort" else right)
    scheduler.allocator.forget_all()
    scheduler.allocator.check()
    assert scheduler.allocator.num_cached == 0 and scheduler.allocator.num_free == 16


# ------------------------------------------------------------------------------------------------ what is refused


def test_a_fixed_batch_shares_nothing():
    with pytest.raises(InputError, match="schedule continuously"):
        scheduler_of(policy="fixed")


def test_only_full_retention_in_pages_shares():
    assert KVPlan(prefix_sharing=True).prefix_sharing
    with pytest.raises(InputError, match=r"contiguous layout has one region per sequence.*Choose the paged layout"):
        KVPlan(layout="contiguous", prefix_sharing=True)
    with pytest.raises(InputError, match="sliding retention writes over"):
        KVPlan(retain=Retain(kind="sliding", window=8), prefix_sharing=True)
