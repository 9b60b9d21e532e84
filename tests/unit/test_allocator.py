"""The block allocator against a model that is just a set, and its taste for consecutive ids."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from tradespace.engine.allocator import BlockAllocator


class Allocations(RuleBasedStateMachine):
    """Owners hold tuples of blocks; the model counts how many owners each block has."""

    owned = Bundle("owned")

    def __init__(self):
        super().__init__()
        self.allocator = BlockAllocator(37)
        self.count = dict.fromkeys(range(37), 0)

    @rule(target=owned, wanted=st.integers(0, 40))
    def allocate(self, wanted):
        free = [block for block, owners in self.count.items() if owners == 0]
        if wanted > len(free):
            return multiple()
        blocks = self.allocator.allocate(wanted)
        assert len(set(blocks)) == len(blocks) == wanted
        assert set(blocks) <= set(free)
        for block in blocks:
            self.count[block] = 1
        return blocks

    @rule(target=owned, blocks=consumes(owned), wanted=st.integers(1, 5))
    def grow(self, blocks, wanted):
        free = {block for block, owners in self.count.items() if owners == 0}
        if wanted > len(free) or not blocks:
            return blocks
        more = self.allocator.allocate(wanted, after=blocks[-1])
        if blocks[-1] + 1 in free:
            assert more[0] == blocks[-1] + 1
        assert set(more) <= free and len(set(more)) == wanted
        for block in more:
            self.count[block] = 1
        return blocks + more

    @rule(target=owned, blocks=owned)
    def share(self, blocks):
        if any(self.count[block] == 0 for block in blocks):
            with pytest.raises(AssertionError):
                self.allocator.share(blocks[:1])
        self.allocator.share(blocks)
        for block in blocks:
            self.count[block] += 1
        return blocks

    @rule(blocks=consumes(owned))
    def free(self, blocks):
        self.allocator.free(blocks)
        for block in blocks:
            self.count[block] -= 1

    @rule(blocks=consumes(owned), kept=st.integers(0, 5), target=owned)
    def give_back_the_tail(self, blocks, kept):
        self.allocator.free(blocks[kept:])
        for block in blocks[kept:]:
            self.count[block] -= 1
        return blocks[:kept]

    @invariant()
    def nothing_leaks(self):
        used = sum(owners > 0 for owners in self.count.values())
        assert self.allocator.num_used == used
        assert self.allocator.num_free == 37 - used
        assert self.allocator.references == list(self.count.values())
        self.allocator.check()


TestAllocations = Allocations.TestCase
TestAllocations.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_freeing_twice_is_caught():
    allocator = BlockAllocator(4)
    blocks = allocator.allocate(2)
    allocator.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(blocks)


def test_a_lone_sequence_lies_in_one_piece_however_it_grows():
    allocator = BlockAllocator(100)
    for _ in range(3):
        blocks = allocator.allocate(7)
        while allocator.num_free:
            blocks += allocator.allocate(min(3, allocator.num_free), after=blocks[-1])
        assert blocks == tuple(range(100))
        allocator.free(blocks)


def test_sequences_that_grow_by_turns_stay_in_one_piece():
    """Four sequences in a cache of which they fill a third: no one's blocks are cut by a neighbour."""
    allocator = BlockAllocator(128)
    tables = [allocator.allocate(2) for _ in range(4)]
    for _ in range(8):
        tables = [table + allocator.allocate(1, after=table[-1]) for table in tables]
    for table in tables:
        assert table == tuple(range(table[0], table[0] + 10))


def test_one_block_per_sequence_is_the_contiguous_layout():
    allocator = BlockAllocator(3)
    assert sorted(allocator.allocate(1) + allocator.allocate(1) + allocator.allocate(1)) == [0, 1, 2]
    assert allocator.num_free == 0


def test_the_heap_of_runs_stays_small():
    allocator = BlockAllocator(64)
    for _ in range(2000):
        allocator.free(allocator.allocate(5))
    assert len(allocator._longest) < 200
