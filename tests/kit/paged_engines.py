"""A paged engine that does all right, and what can go wrong in one: its KV caches are tables of shared blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Final

from attrs import define, field
from tests.kit.catalogue import caught_by
from tests.kit.right_engines import Batching, Cache, forward

from inference_session import Session
from inference_session.engine import BorrowedState, StateSlots


State = BorrowedState[Any]

SIZE: Final = 4
"""How many tokens a block has room for."""


@define(eq=False)
class Block:
    """The entries of some tokens in both layers, and how many tables have it."""

    entries: list[tuple[int, int]] = field(factory=list[tuple[int, int]])
    users: int = 0
    key: object = None
    """What it is found by, once it's full: its tokens, and the key of the block before."""


@define(eq=False)
class Table:
    """A KV cache: the blocks of a session's tokens, by their numbers."""

    blocks: list[int] = field(factory=list[int])
    length: int = 0


def taken(engine: Paged) -> int:
    """Return how many blocks are in use."""
    return len(engine.pool) - len(engine.free)


class Paged(Batching):
    """Full blocks are found by what they hold, shared with a count of users, and copied before they are changed."""

    options: ClassVar[dict[str, Any]] = {"held": taken}

    def __init__(self) -> None:
        super().__init__()
        self.pool = [Block() for _ in range(160)]
        self.free = list(range(160))
        self.found: dict[object, int] = {}

    def make_slots(self) -> StateSlots[Any]:
        """Describe the cache."""
        return StateSlots(
            create=self.create,
            length=self.length,
            truncate=self.truncate,
            share=self.share,
            release=self.release,
        )

    def create(self) -> Table:
        """Return a table without blocks."""
        return Table()

    def length(self, cache: Table) -> int:
        """Return how many tokens a table covers."""
        return cache.length

    def truncate(self, cache: Table, length: int) -> Table:
        """Drop the blocks behind the first tokens."""
        while (len(cache.blocks) - 1) * SIZE >= length and cache.blocks:
            self.drop(cache.blocks.pop())
        cache.length = length
        return cache

    def share(self, cache: Table, length: int) -> Table:
        """Return another table of the same blocks."""
        blocks = cache.blocks[: -(-length // SIZE)]
        for number in blocks:
            self.use(number)
        return Table(blocks, length)

    def release(self, cache: Table) -> None:
        """Drop all blocks."""
        for number in cache.blocks:
            self.drop(number)

    # Blocks

    def take(self) -> int:
        """Take a free block."""
        if not self.free:
            raise MemoryError("out of blocks")
        number = self.free.pop()
        self.pool[number] = Block(users=1)
        return number

    def use(self, number: int) -> None:
        """Count one more user of a block."""
        self.pool[number].users += 1

    def drop(self, number: int) -> None:
        """Count one user less; without any, the block is free."""
        block = self.pool[number]
        block.users -= 1
        if block.users == 0:
            self.unpublish(block)
            self.free.append(number)

    def publish(self, number: int, key: object) -> None:
        """Let others find a full block, unless there is one like it."""
        if key not in self.found:
            self.pool[number].key = key
            self.found[key] = number

    def unpublish(self, block: Block) -> None:
        """Let nobody find a block any more."""
        if block.key is not None:
            del self.found[block.key]
            block.key = None

    def writable(self, cache: Table) -> Block:
        """Return the block for the next token: a new one, or the last, copied if others have it."""
        if cache.length == len(cache.blocks) * SIZE:
            cache.blocks.append(self.take())
        number = cache.blocks[-1]
        kept = self.pool[number].entries[: cache.length % SIZE]
        if self.pool[number].users > 1:
            cache.blocks[-1] = self.copy(kept)
            self.drop(number)
        else:
            self.unpublish(self.pool[number])
            self.pool[number].entries = kept
        return self.pool[cache.blocks[-1]]

    def copy(self, entries: list[tuple[int, int]]) -> int:
        """Return a new block with these entries."""
        number = self.take()
        self.pool[number].entries = list(entries)
        return number

    def keys(self, tokens: Sequence[int]) -> list[object]:
        """Return the keys of the full blocks of some tokens."""
        keys: list[object] = []
        for end in range(SIZE, len(tokens) + 1, SIZE):
            keys.append(self.key(keys[-1] if keys else None, tuple(tokens[end - SIZE : end])))
        return keys

    def key(self, before: object, tokens: tuple[int, ...]) -> object:
        """Return the key of a block: its tokens, and the key of the block before."""
        return before, tokens

    # Steps

    def feed_all_but_last(self, session: Session, state: State) -> None:
        """Begin with blocks of others, where they have the same tokens; and feed the rest."""
        if state.kv_length == 0 and len(state.token_history) > 1:
            found = self.find(state.token_history[:-1])
            if found:
                for number in found:
                    self.use(number)
                table: Table = state.kv_cache
                table.blocks, table.length = found, len(found) * SIZE
                state.advance(table.length)
        super().feed_all_but_last(session, state)

    def find(self, tokens: Sequence[int]) -> list[int]:
        """Return the blocks there are already for the first of some tokens."""
        found: list[int] = []
        for key in self.keys(tokens):
            if key not in self.found:
                break
            found.append(self.found[key])
        return found

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model on the entries of all blocks, and write those of the new tokens."""
        table: Table = state.kv_cache
        entries = [it for number in table.blocks for it in self.pool[number].entries][
            : table.length
        ]
        cache = Cache(([first for first, _ in entries], [second for _, second in entries]))
        out = forward(cache, tokens)
        new = list(zip(*cache.layers, strict=True))[table.length :]
        for entry in new:
            self.writable(table).entries.append(entry)
            table.length += 1
            if table.length % SIZE == 0:
                history = state.token_history[: table.length]
                self.publish(table.blocks[-1], self.keys(history)[-1])
        return out


# The bugs


@caught_by("shared_beginnings", "branches")
class NoCopyOnWrite(Paged):
    """A block that others have is written to."""

    def writable(self, cache: Table) -> Block:
        """Return the last block, as it is."""
        if cache.length == len(cache.blocks) * SIZE:
            cache.blocks.append(self.take())
        block = self.pool[cache.blocks[-1]]
        del block.entries[cache.length % SIZE :]
        return block


@caught_by("shared_beginnings")
class PublishedBlockOverwritten(Paged):
    """A block is still found by its old tokens when its only user writes others to it."""

    def writable(self, cache: Table) -> Block:
        """Return the last block, and leave its key alone."""
        if cache.length < len(cache.blocks) * SIZE and self.pool[cache.blocks[-1]].users == 1:
            block = self.pool[cache.blocks[-1]]
            del block.entries[cache.length % SIZE :]
            return block
        return super().writable(cache)


@caught_by("shared_beginnings")
class ReferenceForgotten(Paged):
    """A block that was found is used, but the user isn't counted."""

    def find(self, tokens: Sequence[int]) -> list[int]:
        """Find blocks, and count one user less, as the caller counts one more."""
        found = super().find(tokens)
        for number in found:
            self.pool[number].users -= 1
        return found


@caught_by("branches")
class ReferenceForgottenByShare(Paged):
    """The blocks of a branch have one user, and are free when the parent goes on without them."""

    def share(self, cache: Table, length: int) -> Table:
        """Return a table of the same blocks, which nobody counts."""
        return Table(cache.blocks[: -(-length // SIZE)], length)


@caught_by("shared_beginnings", "rewind", "close_releases_once")
class BlockDroppedTwice(Paged):
    """A block that was cut off stays in the table, and is dropped again at the end."""

    def truncate(self, cache: Table, length: int) -> Table:
        """Drop blocks, but keep their numbers."""
        kept = -(-length // SIZE)
        for number in cache.blocks[kept:]:
            self.drop(number)
        cache.length = length
        cache.blocks = cache.blocks[:kept] + cache.blocks[kept:][:1]
        return cache

    def drop(self, number: int) -> None:
        """Count one user less, whether there is one or not."""
        block = self.pool[number]
        block.users -= 1
        if block.users <= 0:
            self.unpublish(block)
            self.free.append(number)

    def writable(self, cache: Table) -> Block:
        """Return the block for the next token."""
        del cache.blocks[cache.length // SIZE + 1 :]
        return super().writable(cache)


@caught_by("close_releases_once", "shared_beginnings", "rewind")
class OneBlockTooFewFreed(Paged):
    """The last block isn't freed if it isn't full."""

    def release(self, cache: Table) -> None:
        """Drop the full blocks."""
        for number in cache.blocks[: cache.length // SIZE]:
            self.drop(number)


@caught_by("rewind", "shared_beginnings")
class OneBlockTooFewCut(Paged):
    """A rewind forgets blocks without freeing them."""

    def truncate(self, cache: Table, length: int) -> Table:
        """Forget the blocks behind the first tokens."""
        cache.blocks = cache.blocks[: -(-length // SIZE)]
        cache.length = length
        return cache


@caught_by("close_releases_once", "closed_sessions_leave_nothing", "tokens_reach_the_session")
class ReleaseDoesNothing(Paged):
    """The blocks of a closed session stay in use."""

    def release(self, cache: Table) -> None:
        """Do nothing."""


@caught_by("close_releases_once", "closed_sessions_leave_nothing", "decode_from_the_cache")
class ReleaseMissing(Paged):
    """Nobody told the library how to free a table."""

    def make_slots(self) -> StateSlots[Any]:
        """Describe the cache, but for how to release it."""
        return StateSlots(
            create=self.create, length=self.length, truncate=self.truncate, share=self.share
        )


@caught_by("shared_beginnings")
class StaleKeys(Paged):
    """A block that is free, and then somebody else's, is still found by its old tokens."""

    def unpublish(self, block: Block) -> None:
        """Leave it to be found."""


@caught_by("shared_beginnings")
class StaleKeysOfFreeBlocks(Paged):
    """The same, but only for blocks that became free, not for those that were changed."""

    def drop(self, number: int) -> None:
        """Count one user less; without any, the block is free, and found all the same."""
        block = self.pool[number]
        block.users -= 1
        if block.users == 0:
            self.free.append(number)


@caught_by("shared_beginnings")
class KeysWithoutTheBlocksBefore(Paged):
    """A block is found by its own tokens, whatever was before them."""

    def key(self, before: object, tokens: tuple[int, ...]) -> object:
        """Return the tokens."""
        return tokens


@caught_by("shared_beginnings")
class KeysWithPositionsOnly(Paged):
    """A block is found by its tokens and its place; the tokens before it may be others."""

    def key(self, before: Any, tokens: tuple[int, ...]) -> object:
        """Return the tokens and how many blocks are before."""
        return (0 if before is None else before[0] + 1), tokens


@caught_by("shared_beginnings")
class KeysOfFirstTokens(Paged):
    """A block is found by the first half of its tokens."""

    def key(self, before: object, tokens: tuple[int, ...]) -> object:
        """Return the key of the block before, and some tokens."""
        return before, tokens[: SIZE // 2]


@caught_by("shared_beginnings", "branches")
class CopyTooShort(Paged):
    """The copy of a block lacks its last entry, in whose place comes the first again."""

    def copy(self, entries: list[tuple[int, int]]) -> int:
        """Return a new block with most of the entries."""
        return super().copy([*entries[:-1], *entries[:1]][: len(entries)])


@caught_by("shared_beginnings", "branches")
class CopyLeaksTheOriginal(Paged):
    """Who copies a block stays a user of the original."""

    def copy(self, entries: list[tuple[int, int]]) -> int:
        """Copy, and count one more user of the original, whose count the caller takes back."""
        for number, block in enumerate(self.pool):
            if block.users > 1 and block.entries[: len(entries)] == entries:
                self.use(number)
                break
        return super().copy(entries)


@caught_by("branches")
class TableShared(Paged):
    """A branch has the very list of blocks of its parent, and both add to it."""

    def share(self, cache: Table, length: int) -> Table:
        """Return a table with the same list."""
        for number in cache.blocks:
            self.use(number)
        return Table(cache.blocks, length)


@caught_by("branches")
class ShareCutsTheParent(Paged):
    """Branching off earlier cuts the parent, too."""

    def share(self, cache: Table, length: int) -> Table:
        """Cut, and return another table."""
        shared = super().share(cache, length)
        self.truncate(cache, length)
        return shared


@caught_by("branches")
class ShareRoundsUp(Paged):
    """A branch covers whole blocks, so more than it was asked for."""

    def share(self, cache: Table, length: int) -> Table:
        """Return a table of whole blocks."""
        shared = super().share(cache, length)
        shared.length = min(len(shared.blocks) * SIZE, cache.length)
        return shared


@caught_by("shared_beginnings")
class SharedBlockFreed(Paged):
    """A rewind frees blocks at once, even if others have them."""

    def truncate(self, cache: Table, length: int) -> Table:
        """Free the blocks behind the first tokens."""
        for number in cache.blocks[-(-length // SIZE) :]:
            self.pool[number].users = 1
        return super().truncate(cache, length)


@caught_by("shared_beginnings")
class PublishedTooEarly(Paged):
    """A block is found as soon as it is written to, by the tokens that it will have."""

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model; then let the last block be found, with what is pending."""
        out = super().forward(session, state, tokens)
        table: Table = state.kv_cache
        history = state.token_history[: len(table.blocks) * SIZE]
        if table.blocks and len(history) % SIZE == 0:
            self.publish(table.blocks[-1], self.keys(history)[-1])
        return out


@caught_by("shared_beginnings", "decode_from_the_cache")
class PrefixPositions(Paged):
    """After blocks of others, positions begin at 0 again."""

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model; the first tokens after what was found have the wrong positions."""
        table: Table = state.kv_cache
        fresh = all(self.pool[number].users > 1 for number in table.blocks)
        if not table.blocks or not fresh:
            return super().forward(session, state, tokens)
        return super().forward(session, state, [*tokens[:-1], (tokens[-1] + 1) % 50])


@caught_by("shared_beginnings")
class FoundAgainAfterTheRewind(Paged):
    """Blocks are published by the tokens of the session's first prompt, whatever became of it."""

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model, and publish by the tokens that were there at the beginning."""
        self.prompts = getattr(self, "prompts", {})
        known: list[int] = self.prompts.setdefault(session.id, [])
        known.extend(state.token_history[len(known) :])
        self.known = known
        return super().forward(session, state, tokens)

    def publish(self, number: int, key: object) -> None:
        """Publish by what was known first."""
        depth = 0
        before: Any = key
        while before is not None:
            depth, before = depth + 1, before[0]
        super().publish(number, self.keys(self.known[: depth * SIZE])[-1])


@caught_by("failure_before_advance", "failure_before_the_model_ran")
class FoundBlocksLost(Paged):
    """Blocks that were found are counted before the step is sure to keep them: one that fails leaks them."""

    def feed_all_but_last(self, session: Session, state: State) -> None:
        """Count users, look at the state, and only then fill the table."""
        if state.kv_length == 0 and len(state.token_history) > 1:
            found = self.find(state.token_history[:-1])
            for number in found:
                self.use(number)
            if found:
                table: Table = state.kv_cache
                table.blocks, table.length = found, len(found) * SIZE
                state.advance(table.length)
        for tokens in state.chunks(self.chunk):
            spare = self.take()
            self.feed(session, state, tokens)
            self.drop(spare)


@caught_by("decode_from_the_cache", "shared_beginnings")
class EvictedBlocksStay(Paged):
    """A table that is given back keeps its first block, for a session that will come back."""

    def release(self, cache: Table) -> None:
        """Drop all blocks but the first."""
        for number in cache.blocks[1:]:
            self.drop(number)
