"""Which blocks of the cache are whose. Blocks are numbers here; what lies in them is the cache's business. No torch.

A sequence whose blocks have consecutive ids can be read without a copy, so the allocator continues where the sequence's last block ends, and starts a new
sequence in the middle of the longest free run: the neighbour before it and the sequence itself get equal room to grow. Free runs are kept by start and by
end, so that freeing merges neighbours in O(1); a heap finds the longest in O(log runs). The contiguous layout is the same allocator with one block per
sequence.

A block may have several owners (references), and a name: the key of the tokens whose keys and values it holds. A named block that loses its last owner is free
like any other, but keeps its content and can be found by its name until the free runs are used up; then the least recently freed goes first.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable


class BlockAllocator:
    """`num_blocks` blocks with ids 0 … num_blocks - 1. Always: free + used == total; what is cached without an owner counts as free.

    num_surplus   references beyond each block's first: how many blocks sharing saves
    """

    def __init__(self, num_blocks: int):
        assert num_blocks >= 1, f"{num_blocks} blocks"
        self.num_blocks = num_blocks
        self.reset()

    def reset(self) -> None:
        """Every block is free again, whatever state the allocator was in."""
        self.references = [0] * self.num_blocks
        self.num_free = self.num_blocks
        self.num_used = 0
        self.num_surplus = 0
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # named blocks without an owner, the least recently freed first
        self._length_at = {0: self.num_blocks}  # start of a free run → its length
        self._start_before = {self.num_blocks: 0}  # the id after a free run → its start
        self._longest = [(-self.num_blocks, 0)]  # heap; entries whose run has changed since are dropped when met

    def allocate(self, count: int, *, after: int | None = None) -> tuple[int, ...]:
        """`count` free blocks, consecutive where possible and, where `after` is given, continuing behind that block.

        The caller asks for no more than `num_free`. Each block comes with one reference and without a name.
        """
        assert 0 <= count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        while count > self.num_free - len(self._cached):
            self._evict()
        found: list[int] = []
        if count and after is not None and after + 1 in self._length_at:
            found += self._take(after + 1, after + 1, min(count, self._length_at[after + 1]))
        while len(found) < count:
            start, length = self._longest_run()
            wanted = min(count - len(found), length)
            # a run that begins at 0 has no neighbour that could want to grow into it
            offset = 0 if start == 0 or found else (length - wanted) // 2
            found += self._take(start, start + offset, wanted)
        self.num_free -= count
        self.num_used += count
        self._check_balance()
        return tuple(found)

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each block, which must be in use or have a name."""
        for block in blocks:
            if self.references[block] == 0:
                assert block in self._cached, f"block {block} is free and cannot be shared"
                del self._cached[block]
                self.num_free -= 1
                self.num_used += 1
            else:
                self.num_surplus += 1
            self.references[block] += 1
        self._check_balance()

    def free(self, blocks: Iterable[int]) -> None:
        """One reference less to each block; those without any are free again, and cached where they have a name. The last one given is evicted last."""
        for block in blocks:
            assert self.references[block] > 0, f"block {block} is freed twice"
            self.references[block] -= 1
            if self.references[block]:
                self.num_surplus -= 1
                continue
            self.num_free += 1
            self.num_used -= 1
            if block in self._name_of:
                self._cached[block] = None
            else:
                self._release(block)
        self._check_balance()

    def find(self, name: bytes) -> int | None:
        """The block of this name, in use or cached."""
        return self._block_of.get(name)

    def name_of(self, block: int) -> bytes | None:
        return self._name_of.get(block)

    def name(self, block: int, name: bytes) -> None:
        """From now on `block`, which is in use, can be found. Where another block has that name already, or this one has a name, nothing changes."""
        assert self.references[block] > 0, f"block {block} is free and cannot be named"
        if name not in self._block_of and block not in self._name_of:
            self._block_of[name] = block
            self._name_of[block] = name

    def forget(self, blocks: Iterable[int]) -> None:
        """Takes away the blocks' names, before something else is written into them; those that were only cached are plainly free then."""
        for block in blocks:
            name = self._name_of.pop(block, None)
            if name is not None:
                del self._block_of[name]
                if block in self._cached:
                    del self._cached[block]
                    self._release(block)

    def forget_all(self) -> None:
        self.forget(tuple(self._name_of))

    @property
    def num_cached(self) -> int:
        """Free blocks whose content can still be found."""
        return len(self._cached)

    def check(self) -> None:
        """Compare the free runs with the reference counts, block by block: O(num_blocks), for tests."""
        free = [block for start, length in self._length_at.items() for block in range(start, start + length)]
        assert not set(free) & set(self._cached), "a cached block lies in a free run"
        free += self._cached
        assert len(free) == len(set(free)) == self.num_free, f"free runs and cache hold {len(free)} blocks, {self.num_free} are counted"
        assert all(self.references[block] == 0 for block in free), "a free run holds a block in use"
        assert sum(count > 0 for count in self.references) == self.num_used
        assert sum(self.references) - self.num_used == self.num_surplus
        assert {block: name for name, block in self._block_of.items()} == self._name_of, "a name leads to another block"
        assert all(block in self._name_of for block in self._cached) and not any(block in self._name_of for block in free[: len(free) - len(self._cached)])
        assert {start + length: start for start, length in self._length_at.items()} == self._start_before
        assert not set(self._length_at) & set(self._start_before), "neighbouring free runs were not merged"

    def _check_balance(self) -> None:
        assert self.num_free + self.num_used == self.num_blocks, f"block leak: {self.num_free} + {self.num_used} != {self.num_blocks}"

    def _evict(self) -> None:
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._name_of.pop(block)]
        self._release(block)

    def _longest_run(self) -> tuple[int, int]:
        while self._length_at.get(self._longest[0][1]) != -self._longest[0][0]:
            heapq.heappop(self._longest)
        return self._longest[0][1], -self._longest[0][0]

    def _add_run(self, start: int, length: int) -> None:
        self._length_at[start] = length
        self._start_before[start + length] = start
        heapq.heappush(self._longest, (-length, start))
        if len(self._longest) > 64 + 4 * len(self._length_at):
            self._longest = [(-length, start) for start, length in self._length_at.items()]
            heapq.heapify(self._longest)

    def _drop_run(self, start: int) -> int:
        length = self._length_at.pop(start)
        del self._start_before[start + length]
        return length

    def _take(self, run: int, start: int, count: int) -> range:
        """Cut start … start + count - 1 out of the free run that begins at `run`."""
        length = self._drop_run(run)
        if start > run:
            self._add_run(run, start - run)
        if start + count < run + length:
            self._add_run(start + count, run + length - start - count)
        for block in range(start, start + count):
            self.references[block] = 1
        return range(start, start + count)

    def _release(self, block: int) -> None:
        start, length = block, 1
        if block in self._start_before:
            start = self._start_before[block]
            length += self._drop_run(start)
        if block + 1 in self._length_at:
            length += self._drop_run(block + 1)
        self._add_run(start, length)
