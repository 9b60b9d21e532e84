"""The scheduler against the hash machine: whatever is in the batch, tokens do not change, nothing leaks, nobody starves."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.oracle import EOS, HashMachine, ScriptedDrafter, check_blocks, expected, run_step
from tradespace.engine.request import Request, SamplingParams
from tradespace.engine.scheduler import Scheduler
from tradespace.errors import InputError
from tradespace.spec.kv import KVPlan, expected_waste
from tradespace.spec.plan import Plan


def make(name: str, prompt: int, output: int, *, priority: int = 0, seed: int = 0, eos: bool = True) -> Request:
    pick = random.Random(f"{name}-{seed}")
    return Request(
        id=name,
        prompt_ids=tuple(pick.randrange(31) for _ in range(prompt)),
        params=SamplingParams(max_tokens=output, temperature=0),
        priority=priority,
        eos_ids=frozenset({EOS}) if eos else frozenset(),
    )


def scheduler_of(**changes) -> Scheduler:
    settings = {"num_blocks": 12, "block_size": 4, "max_sequences": 4, "max_context": 48, "step_tokens": 8, **changes}
    return Scheduler(**settings)


def drain(scheduler: Scheduler, requests: list[Request], drafter: ScriptedDrafter | None = None) -> int:
    machine, steps = HashMachine(scheduler), 0
    while scheduler.has_work:
        run_step(scheduler, machine, drafter)
        steps += 1
        assert steps <= sum(request.num_prompt + request.params.max_tokens for request in requests), "no progress"
    for request in requests:
        assert request.output_ids == expected(request), request.id
        assert request.finish_reason in ("stop", "length") and not request.blocks
    assert scheduler.allocator.num_used == 0
    return steps


shapes = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 18), st.integers(0, 2)), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@given(
    shapes=shapes,
    block_size=st.sampled_from([1, 3, 4]),
    spare_blocks=st.integers(0, 20),
    max_sequences=st.integers(1, 6),
    step_tokens=st.integers(1, 40),
    max_drafts=st.integers(0, 4),
    wrong=st.sampled_from([0.0, 0.3, 1.0]),
    policy=st.sampled_from(["continuous", "fixed"]),
    seed=st.integers(0, 1000),
)
def test_tokens_do_not_depend_on_scheduling(shapes, block_size, spare_blocks, max_sequences, step_tokens, max_drafts, wrong, policy, seed):
    """All at once, into caches down to the smallest that fits one: same tokens, no leak, the first advances in every step (run_step checks that)."""
    scheduler = scheduler_of(
        block_size=block_size,
        num_blocks=48 // block_size + spare_blocks,
        max_sequences=max_sequences,
        step_tokens=step_tokens,
        max_drafts=max_drafts,
        policy=policy,
    )
    requests = [make(f"r{i}", prompt, output, priority=priority, seed=seed) for i, (prompt, output, priority) in enumerate(shapes)]
    for request in requests:
        scheduler.add(request)
    drain(scheduler, requests, ScriptedDrafter(wrong, seed))


@settings(max_examples=60, deadline=None)
@given(shapes=shapes, step_tokens=st.integers(1, 16), block_size=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 1000))
def test_the_oldest_always_advances(shapes, step_tokens, block_size, seed):
    """Arrivals while others run, in a cache that holds one at most: everyone finishes, in as many steps at most as there are tokens."""
    scheduler = scheduler_of(num_blocks=48 // block_size, block_size=block_size, max_sequences=9, step_tokens=step_tokens)
    pick, machine = random.Random(seed), HashMachine(scheduler)
    requests = [make(f"r{i}", prompt, output, seed=seed) for i, (prompt, output, _) in enumerate(shapes)]
    queue, steps = list(requests), 0
    while queue or scheduler.has_work:
        while queue and (pick.random() < 0.3 or not scheduler.has_work):
            scheduler.add(queue.pop(0))
        run_step(scheduler, machine)
        steps += 1
    assert steps <= sum(prompt + output for prompt, output, _ in shapes)
    assert all(request.output_ids == expected(request) for request in requests)


def test_thousands_of_arrivals_aborts_and_preemptions_leak_nothing():
    pick = random.Random(5)
    scheduler = scheduler_of(num_blocks=16, max_sequences=8, step_tokens=24, max_drafts=3)
    machine, drafter = HashMachine(scheduler), ScriptedDrafter(0.4)
    made: list[Request] = []
    while len(made) < 3000 or scheduler.has_work:
        while len(made) < 3000 and len(scheduler.waiting) < 4:
            made.append(make(f"r{len(made)}", pick.randint(1, 12), pick.randint(1, 36), priority=pick.choice([0, 0, 0, 1])))
            scheduler.add(made[-1])
        run_step(scheduler, machine, drafter)
        if pick.random() < 0.2 and scheduler.has_work:
            scheduler.abort(pick.choice([*scheduler.running, *scheduler.waiting]))
            check_blocks(scheduler)
    assert scheduler.allocator.num_used == 0 and not scheduler._live
    aborted = [request for request in made if request.finish_reason == "abort"]
    assert len(aborted) > 300 and scheduler.counters.preemptions > 300
    assert scheduler.counters.accepted_drafts > 1000
    for request in made:
        right = expected(request)
        assert request.output_ids == (right[: request.num_outputs] if request.finish_reason == "abort" else right)


def test_a_request_that_is_aborted_while_its_step_runs_takes_no_tokens():
    scheduler = scheduler_of()
    first, second = make("a", 3, 5), make("b", 3, 5)
    scheduler.add(first)
    scheduler.add(second)
    step = scheduler.schedule()
    scheduler.abort(first)
    scheduler.commit(step, {"a": [7], "b": [7]}, {})
    assert first.output_ids == [] and second.output_ids == [7]
    scheduler.abort(second)
    scheduler.abort(second)
    assert scheduler.allocator.num_used == 0


def test_decodes_come_first_and_prompts_share_what_is_left():
    scheduler = scheduler_of(num_blocks=30)
    machine = HashMachine(scheduler)
    scheduler.add(make("short", 3, 18, eos=False))
    run_step(scheduler, machine)
    scheduler.add(make("long", 20, 5, eos=False))
    step = run_step(scheduler, machine)
    assert [(item.request.id, item.num_tokens) for item in step.sequences] == [("short", 1), ("long", 7)]
    step = run_step(scheduler, machine)
    assert [(item.request.id, item.start, item.num_tokens) for item in step.sequences] == [("short", 4, 1), ("long", 7, 7)]


def test_the_latest_is_preempted_and_computed_again():
    scheduler = scheduler_of(num_blocks=6, step_tokens=48, max_context=24)
    requests = [make("a", 8, 16, eos=False), make("b", 8, 16, eos=False)]
    for request in requests:
        scheduler.add(request)
    drain(scheduler, requests)
    assert [request.num_preemptions for request in requests] == [0, 1]
    assert scheduler.counters.preemptions == 1 and scheduler.counters.recomputed_tokens > 8


def test_a_decode_that_was_scheduled_already_makes_room_for_a_prompt_before_it():
    """The prompt was let in while the other still fitted, which then grows into its blocks: it leaves the step, and its token of the budget is free again."""
    scheduler = scheduler_of(num_blocks=19, block_size=1, step_tokens=3)
    machine = HashMachine(scheduler)
    low, high = make("low", 2, 15, priority=1, eos=False), make("high", 12, 4, eos=False)
    scheduler.add(low)
    run_step(scheduler, machine)
    scheduler.add(high)
    while not low.num_preemptions:
        step = run_step(scheduler, machine)
    assert step.preempted == (low,) and [item.request for item in step.sequences] == [high]
    while scheduler.has_work:
        run_step(scheduler, machine)
    assert low.output_ids == expected(low) and high.output_ids == expected(high)


def test_a_request_waits_until_those_that_run_can_grow_beside_it():
    for num_blocks, admitted in ((6, ["a", "b"]), (5, ["a"])):
        scheduler = scheduler_of(num_blocks=num_blocks, step_tokens=16)
        for name in ("a", "b"):
            scheduler.add(make(name, 8, 12, eos=False))
        assert [item.request.id for item in scheduler.schedule().sequences] == admitted


def test_a_long_first_prompt_advances_beside_prompts_of_one_token():
    scheduler = scheduler_of(step_tokens=2, policy="fixed")
    requests = [make("long", 9, 2, eos=False), *(make(f"r{i}", 1, 2, eos=False) for i in range(3))]
    for request in requests:
        scheduler.add(request)
    drain(scheduler, requests)


def test_priority_goes_first():
    scheduler = scheduler_of(max_sequences=1)
    machine = HashMachine(scheduler)
    requests = [make("later", 4, 4, priority=1, eos=False), make("sooner", 4, 4, eos=False)]
    for request in requests:
        scheduler.add(request)
    assert [item.request.id for item in run_step(scheduler, machine).sequences] == ["sooner"]


@pytest.mark.parametrize(
    ("changes", "prompt", "output", "says"),
    [
        ({}, 40, 9, r"need a context of 49; there are 48. Fits with max_tokens 8, or plan a context of 49"),
        ({}, 60, 2, r"Shorten the prompt by at least 13 tokens"),
        ({"num_blocks": 5}, 15, 7, r"need 21 slots of the KV cache; it has 20. Fits with max_tokens 6, or give more memory"),
        ({"num_blocks": 5}, 30, 1, r"Shorten the prompt by at least 10 tokens"),
    ],
)
def test_what_can_never_fit_is_refused_with_a_remedy_that_works(changes, prompt, output, says):
    scheduler = scheduler_of(**changes)
    with pytest.raises(InputError, match=says):
        scheduler.add(make("a", prompt, output))
    assert not scheduler.has_work
    if "Fits" in says:
        fits = make("b", prompt, output - 1, eos=False)
        scheduler.add(fits)
        drain(scheduler, [fits])


def test_an_id_is_used_once_at_a_time():
    scheduler = scheduler_of()
    first = make("a", 3, 2)
    scheduler.add(first)
    with pytest.raises(InputError, match="'a' is under way"):
        scheduler.add(make("a", 3, 2))
    drain(scheduler, [first])
    scheduler.add(make("a", 3, 2))


def test_unknown_policies_are_named():
    with pytest.raises(InputError, match="continuous, fixed"):
        scheduler_of(policy="static")


def test_a_fixed_batch_runs_until_all_its_members_have_ended():
    scheduler = scheduler_of(num_blocks=8, max_sequences=3, step_tokens=48, policy="fixed")
    machine = HashMachine(scheduler)
    # 8 blocks: a and b reserve 2 + 5 of 4 slots, c must wait for both although 1 block is free after a
    requests = [make("a", 4, 2, eos=False), make("b", 4, 16, eos=False), make("c", 4, 4, eos=False)]
    for request in requests:
        scheduler.add(request)
    seen = []
    while scheduler.has_work:
        step = run_step(scheduler, machine)
        seen.append("".join(item.request.id for item in step.sequences))
        if "b" in seen[-1]:
            assert step.slots.allocated == 7 * 4
    assert seen == ["ab", "ab", *["b"] * 14, *["c"] * 4]
    assert scheduler.allocator.num_used == 0 and scheduler.counters.preemptions == 0


def test_a_reset_frees_everything_from_any_state():
    scheduler = scheduler_of()
    requests = [make(f"r{i}", 20, 8) for i in range(6)]
    for request in requests:
        scheduler.add(request)
    machine = HashMachine(scheduler)
    run_step(scheduler, machine)
    scheduler.schedule()
    scheduler.running.pop()  # as an interrupt between two lines may leave it
    assert set(scheduler.reset("abort")) == set(requests)
    assert {request.finish_reason for request in requests} == {"abort"}
    assert scheduler.allocator.num_free == 12 and not scheduler.has_work
    again = make("again", 20, 8)
    scheduler.add(again)
    drain(scheduler, [again])


def test_right_drafts_save_steps_and_rejected_ones_give_their_blocks_back():
    steps = {}
    for wrong in (None, 0.0, 1.0):
        scheduler = scheduler_of(max_drafts=0 if wrong is None else 5, step_tokens=16)
        request = make("a", 4, 18, eos=False)
        scheduler.add(request)
        steps[wrong] = drain(scheduler, [request], None if wrong is None else ScriptedDrafter(wrong))
    assert steps[None] == steps[1.0] == 18
    # the first step drafts nothing beyond itself: 6 tokens a step
    assert steps[0.0] == 3


def test_drafts_displace_nobody():
    """A cache that is exactly full: drafts get no block, so nobody is preempted for them."""
    for drafts in (0, 4):
        scheduler = scheduler_of(num_blocks=8, max_drafts=drafts, step_tokens=16)
        requests = [make("a", 8, 9, eos=False), make("b", 8, 9, eos=False)]
        for request in requests:
            scheduler.add(request)
        drain(scheduler, requests, ScriptedDrafter(0.5))
        assert scheduler.counters.preemptions == 0


def waste_of(layout: str, lengths: list[tuple[int, int]]) -> float:
    plan = Plan(model="any", kv=KVPlan(layout=layout, block_size=16), max_sequences=16, max_context=512, step_tokens=512, kv_tokens=16 * 512)
    scheduler = Scheduler.from_plan(plan)
    requests = [make(f"r{i}", prompt, output, eos=False) for i, (prompt, output) in enumerate(lengths)]
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        step = scheduler.schedule()
        done = {item.request.id: "length" for item in step.sequences if item.samples and item.request.num_outputs + 1 == item.request.params.max_tokens}
        scheduler.commit(step, {item.request.id: [1] for item in step.sequences if item.samples}, done)
    return scheduler.counters.slot_waste


def test_the_waste_of_paging_is_what_the_formula_says():
    pick = random.Random(3)
    # a block is empty on average by 7.5 of 16 slots only where lengths are spread evenly over it
    lengths = [(pick.randint(16, 256), 64) for _ in range(150)]
    mean = sum(prompt + output / 2 for prompt, output in lengths) / len(lengths)
    paged, contiguous = waste_of("paged", lengths), waste_of("contiguous", lengths)
    assert paged == pytest.approx(expected_waste(mean, 16), rel=0.1)
    assert contiguous == pytest.approx(1 - mean / 512, rel=0.1)
