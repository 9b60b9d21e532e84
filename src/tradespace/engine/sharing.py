"""Equal prefixes share blocks: found by a hash chain over full blocks, owned by reference counts, copied when somebody writes. No torch. arXiv:2309.06180

A full block's name is a digest of its predecessor's name and its own tokens, so equal names mean equal tokens from the first one on and, with full retention,
equal keys and values. It is 128 bits of BLAKE2b: two prefixes that differ are not to be expected under one name before 2^60 blocks. A block gets its name once
the step that filled it is committed, so neither drafted tokens nor those of a failed step ever have one.

A request that begins takes the blocks of the request that it was forked from, else those that are found by name, and computes the rest: at least its last
token, for the logits. A prompt whose next block another one computes in this very step waits for the next step and finds it there.

Cost: a digest for each full block, about a microsecond, and a look-up for each full block of a prompt.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeGuard

from tradespace.engine.allocator import BlockAllocator
from tradespace.engine.request import Request
from tradespace.engine.step import Counters
from tradespace.spec.kv import num_blocks as blocks_for

DIGEST_BYTES = 16


def extend_names(names: list[bytes], tokens: Sequence[int], block_size: int, *, root: bytes = b"") -> None:
    """Adds the names of those full blocks of `tokens` that `names` has not yet. `root`: what beside them changes keys and values: the adapter."""
    for start in range(len(names) * block_size, len(tokens) - block_size + 1, block_size):
        content = array("q", tokens[start : start + block_size]).tobytes()
        names.append(blake2b(content, digest_size=DIGEST_BYTES, key=names[-1] if names else root).digest())


class Unshared:
    """What the scheduler asks before a request takes blocks, and tells when blocks have been filled, where each request has its blocks for itself."""

    def __init__(self, block_size: int):
        self.block_size = block_size

    def begin_step(self) -> None:
        """Comes before a step's first question."""

    def adopt(self, request: Request) -> None:
        """Give `request` the blocks that hold its next tokens, as far as there are any."""
        request.source = None

    def awaits(self, request: Request) -> bool:
        """Whether the next tokens of `request` are being computed for another, so that a step later it can have them."""
        return False

    def will_fill(self, request: Request, num_tokens: int) -> None:
        """The step computes `num_tokens` tokens of a prompt: nobody else needs to compute them beside it."""

    def fresh_blocks(self, request: Request) -> int:
        """Blocks that the tokens of a request that has not begun need beside those in use already; that of the last token is written into, and so needed."""
        return blocks_for(request.num_tokens, self.block_size)

    def must_copy(self, request: Request) -> bool:
        """Whether the block that the next token goes into has other owners, too."""
        return False

    def own(self, request: Request) -> tuple[int, int] | None:
        """Make the block that the next token goes into one that only `request` sees. (source, target), where that takes a copy; a block must be free then."""
        return None

    def publish(self, request: Request) -> None:
        """Name the blocks that the last step filled."""


class Sharing(Unshared):
    """The same where equal prefixes share blocks."""

    def __init__(self, allocator: BlockAllocator, block_size: int, counters: Counters):
        super().__init__(block_size)
        self.allocator, self.counters = allocator, counters
        self._pending: set[bytes] = set()  # names of blocks that prompts of the step under construction will have filled

    def begin_step(self) -> None:
        self._pending.clear()

    def adopt(self, request: Request) -> None:
        if request.num_computed == 0:
            self.counters.prefix_cache_queries += request.num_tokens
        if request.num_computed % self.block_size == 0:  # else it is in the midst of a block that it fills itself
            blocks, held = self._found(request)
            self.allocator.share(blocks)
            request.blocks += tuple(blocks)
            self._count(request, held - request.num_computed)
            request.num_computed, request.num_published = held, held // self.block_size
        request.source = None

    def awaits(self, request: Request) -> bool:
        if _runs(request.source):
            return request.source.num_computed < request.num_tokens - 1
        if not self._pending or request.num_computed % self.block_size:
            return False
        names, following = self._names(request), request.num_computed // self.block_size + len(self._found(request)[0])
        return following < len(names) and names[following] in self._pending

    def will_fill(self, request: Request, num_tokens: int) -> None:
        first, last = (position // self.block_size for position in (request.num_computed, request.num_computed + num_tokens))
        self._pending.update(self._names(request)[first:last])

    def fresh_blocks(self, request: Request) -> int:
        blocks, _ = self._found(request)
        whole = blocks[: (request.num_tokens - 1) // self.block_size]
        return blocks_for(request.num_tokens, self.block_size) - sum(self.allocator.references[block] > 0 for block in whole)

    def must_copy(self, request: Request) -> bool:
        index = request.num_computed // self.block_size
        return index < len(request.blocks) and self.allocator.references[request.blocks[index]] > 1

    def own(self, request: Request) -> tuple[int, int] | None:
        index = request.num_computed // self.block_size
        if index >= len(request.blocks):
            return None
        block = request.blocks[index]
        if self.allocator.references[block] > 1:
            (copy,) = self.allocator.allocate(1, after=request.blocks[index - 1] if index else None)
            self.allocator.free((block,))
            request.blocks = (*request.blocks[:index], copy, *request.blocks[index + 1 :])
            self.counters.copied_blocks += 1
            return block, copy
        name = self.allocator.name_of(block)
        # the last token of a prompt that was found whole is written over itself; anything else would make the name a lie
        if name is not None and name not in self._names(request)[index : index + 1]:
            self.allocator.forget((block,))
        return None

    def publish(self, request: Request) -> None:
        filled = request.num_computed // self.block_size
        if filled > request.num_published:
            names = self._names(request)
            for index in range(request.num_published, filled):
                self.allocator.name(request.blocks[index], names[index])
            request.num_published = filled

    def _names(self, request: Request) -> list[bytes]:
        name = request.params.adapter
        root = b"" if name is None else blake2b(name.encode(), digest_size=DIGEST_BYTES).digest()
        extend_names(request.block_names, request.token_ids, self.block_size, root=root)
        return request.block_names

    def _found(self, request: Request) -> tuple[list[int], int]:
        """The blocks that hold the tokens from `num_computed` on, where a block begins; and how many tokens are held then, not counting the last one."""
        last = request.num_tokens - 1
        if _runs(request.source):
            held = min(request.source.num_computed, last)
            return list(request.source.blocks[: blocks_for(held, self.block_size)]), held
        first, blocks = request.num_computed // self.block_size, []
        if request.params.prompt_logprobs is not None:  # what was computed for another has left no logits
            return [], request.num_computed
        for name in self._names(request)[first:]:
            block = self.allocator.find(name)
            if block is None:
                break
            blocks.append(block)
        return blocks, min((first + len(blocks)) * self.block_size, last)

    def _count(self, request: Request, gained: int) -> None:
        self.counters.prefix_cache_hits += gained
        if request.num_preemptions == 0:
            request.num_cached += gained
        found_again = min(gained, request.num_lost)
        request.num_lost -= found_again
        self.counters.recomputed_tokens -= found_again


def _runs(source: Request | None) -> TypeGuard[Request]:
    return source is not None and source.state == "running"
