"""A paged engine: the KV cache of a session is a table of blocks out of one pool, as in vLLM.

The model is the Llama of `llama_model.py`, whose weights and arithmetic stay as they are: it writes
to a `BlockTable` as it does to any other KV cache.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from hashlib import sha256

import numpy as np

from inference_session import Session
from inference_session.engine import BorrowedState, DecodeResult, PrefillResult, StateSlots
from llama_model import Floats, Llama, LlamaConfig, Tokens


Part = tuple[BorrowedState["BlockTable"], int]
"""A session's part in a pass: how many of its pending tokens are fed."""


class BlockTable:
    """The KV cache of a session: the blocks that hold its tokens, in order.

    Only the borrower of the session uses it. It may have more blocks than its tokens need: those
    are its own, reserved for the next pass.
    """

    def __init__(self, pool: BlockPool) -> None:
        self.length = 0
        """How many tokens it covers, in all layers: a pass moves it at its end."""
        self.blocks: list[int] = []
        self.keys: list[bytes] = []
        """The keys of its full blocks."""
        self._pool = pool

    def write(self, index: int, keys_values: Floats, /) -> tuple[Floats, Floats]:
        """Put keys and values (R, 2K, d) behind the tokens of layer `index`.

        Returns all keys and all values of the layer, (K, length + R, d) each, gathered from the
        blocks: NumPy has no kernel that attends to blocks where they are.
        """
        layer, size = self._pool.layers[index], self._pool.block_size
        end = self.length + len(keys_values)
        blocks, places = np.array(self.blocks), np.arange(self.length, end)
        layer[:, blocks[places // size], places % size] = keys_values.transpose(1, 0, 2)
        gathered = layer.take(blocks[: self._pool.blocks_for(end)], axis=1)
        keys, values = np.split(gathered.reshape(len(layer), -1, layer.shape[3])[:, :end], 2)
        return keys, values


class BlockPool:
    """The memory of all KV caches: blocks of `block_size` tokens, counted and shared.

    A full block gets a key: a digest of its tokens and of the key of the block before it, so it
    stands for all tokens up to the block's end. What a block holds depends on these tokens alone.
    So a block is published under its key as soon as a pass has written all of it, and any table
    with the same tokens takes it instead of computing its own. That the step may still be rolled
    back doesn't matter: its tokens are forgotten then, but these numbers remain right for them.

    A shared block is never written to. A table that has to, because it was cut in the middle of a
    block, first copies the block; or withdraws it, if no other table has it.

    A free block stays published until it is used for something else, the longest unused one first.

    Tables drop their blocks without the lock, into a queue that the next holder of the lock
    empties: the garbage collector may end a session in the middle of any method here. Two lines
    that belong together are in such an order that an interrupt between them may cost the pool some
    blocks, but never frees or publishes one that is being written to.
    """

    def __init__(self, config: LlamaConfig, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.layers: Floats = np.empty(
            (config.num_layers, 2 * config.num_kv_heads, num_blocks, block_size, config.head_dim),
            np.float32,
        )
        """A block's keys and values are `layers[:, :, block]`."""
        self._references = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(num_blocks))  # The longest unused one first.
        self._published: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}  # Of the published blocks.
        self._dropped: deque[list[int]] = deque()
        self._lock = threading.Lock()

    # What a session does with its table

    def create(self) -> BlockTable:
        """Return an empty table."""
        return BlockTable(self)

    def truncate(self, table: BlockTable, length: int) -> BlockTable:
        """Keep at most the first `length` tokens, and no more blocks than they need."""
        table.length = min(table.length, length)
        kept = self.blocks_for(table.length)
        dropped = table.blocks[kept:]
        del table.blocks[kept:], table.keys[table.length // self.block_size :]
        self._dropped.append(dropped)
        return table

    def share(self, table: BlockTable, length: int) -> BlockTable:
        """Return another table with the blocks of at most the first `length` tokens."""
        shared = self.create()
        with self._lock:
            self._count_dropped()
            shared.length = min(table.length, length)
            shared.blocks = table.blocks[: self.blocks_for(shared.length)]
            shared.keys = table.keys[: shared.length // self.block_size]
            for block in shared.blocks:
                self._references[block] += 1
        return shared

    def release(self, table: BlockTable) -> None:
        """Drop all blocks."""
        self.truncate(table, 0)

    def nbytes(self, table: BlockTable) -> int:
        """Return the bytes of its blocks, shared or not."""
        return len(table.blocks) * self.layers[:, :, 0].nbytes

    # What a pass needs

    @property
    def held(self) -> int:
        """How many blocks are in tables; the others are free."""
        with self._lock:
            self._count_dropped()
            return self.num_blocks - len(self._free)

    def blocks_for(self, length: int) -> int:
        """Return how many blocks hold so many tokens."""
        return -(-length // self.block_size)

    def reserve(self, batch: Sequence[tuple[BlockTable, int]]) -> None:
        """Give each table the blocks to write so many more tokens to; or none of them.

        Raises `MemoryError` if the pool has too few free blocks.
        """
        with self._lock:
            self._count_dropped()
            needed = sum(self._lacking(table, count) for table, count in batch)
            if needed > len(self._free):
                msg = (
                    f"{needed} more blocks are needed, and {len(self._free)} of the pool's "
                    f"{self.num_blocks} are free"
                )
                raise MemoryError(msg)
            for table, count in batch:
                self._make_writable(table)
                while len(table.blocks) < self.blocks_for(table.length + count):
                    table.blocks.append(self._allocate())

    def publish(self, table: BlockTable, history: Sequence[int]) -> None:
        """Publish the blocks that the last pass has filled with the tokens of `history`."""
        with self._lock:
            self._count_dropped()
            for index in range(len(table.keys), table.length // self.block_size):
                key, block = self._key(table, index, history), table.blocks[index]
                table.keys.append(key)
                if key not in self._published:
                    self._keys[block] = key
                    self._published[key] = block

    def reuse(self, table: BlockTable, history: Sequence[int]) -> int:
        """Let a table take published blocks for its next tokens, but not for the last.

        Returns how many more tokens it covers.
        """
        before, size = table.length, self.block_size
        with self._lock:
            self._count_dropped()
            for index in range(before // size, (len(history) - 1) // size):
                key = self._key(table, index, history)
                block = self._published.get(key)
                if block is None:
                    break
                self._free.pop(block, None)
                self._references[block] += 1
                part = table.blocks[index:]  # Of this block, if anything.
                table.blocks[index:] = [block]
                self._dropped.append(part)
                table.keys.append(key)
                table.length = (index + 1) * size
        return table.length - before

    # The books, with the lock held

    def _count_dropped(self) -> None:
        while self._dropped:
            for block in reversed(self._dropped.popleft()):  # A prefix is used the longest.
                self._references[block] -= 1
                if not self._references[block]:
                    self._free[block] = None

    def _key(self, table: BlockTable, index: int, history: Sequence[int]) -> bytes:
        """Return the key of a table's next full block."""
        before = table.keys[index - 1] if index else b""
        tokens = _array(history[index * self.block_size : (index + 1) * self.block_size])
        return sha256(before + tokens.tobytes()).digest()

    def _lacking(self, table: BlockTable, count: int) -> int:
        """Return how many blocks `reserve` takes for a table."""
        missing = self.blocks_for(table.length + count) - len(table.blocks)
        return max(missing, 0) + self._is_shared(table)

    def _is_shared(self, table: BlockTable) -> bool:
        """Return whether the next token goes to a block that other tables have, too."""
        index = table.length // self.block_size
        return index < len(table.blocks) and self._references[table.blocks[index]] > 1

    def _make_writable(self, table: BlockTable) -> None:
        """Let the block that the next token goes to be the table's alone, and unpublished."""
        index, used = divmod(table.length, self.block_size)
        if index == len(table.blocks):
            return
        block = table.blocks[index]
        if not self._is_shared(table):
            self._withdraw(block)
            return
        copy = self._allocate()
        self.layers[:, :, copy, :used] = self.layers[:, :, block, :used]
        table.blocks[index] = copy
        self._references[block] -= 1

    def _allocate(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._withdraw(block)
        self._references[block] = 1
        return block

    def _withdraw(self, block: int) -> None:
        """Take back a published block, before something else is written to it."""
        key = self._keys.get(block)
        if key is not None:
            self._published.pop(key, None)
            del self._keys[block]


class PagedEngine:
    """An `inference_session.engine.BatchEngine`: any number of sessions over one pool of blocks.

    Between calls the last token of a session is pending, as the next one is computed from it.
    Steps of different sessions may come from different threads: the pool's lock guards its books,
    and a pass writes to blocks of its own only.

    Calls raise `MemoryError` if the pool has too few free blocks: evict a session and try again.
    """

    def __init__(
        self, model: Llama, *, num_blocks: int = 256, block_size: int = 16, chunk: int = 256
    ) -> None:
        """Serve `model`; `chunk` is the most tokens of a session fed at once."""
        if min(num_blocks, block_size, chunk) < 1:
            msg = "num_blocks, block_size and chunk must be at least 1"
            raise ValueError(msg)
        self.model = model
        self.chunk = chunk
        self.pool = BlockPool(model.config, num_blocks, block_size)
        self.slots = StateSlots(
            create=self.pool.create,
            length=lambda table: table.length,
            truncate=self.pool.truncate,
            share=self.pool.share,
            release=self.pool.release,
            nbytes=self.pool.nbytes,
        )

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Add tokens, and fill the KV cache with all but the last.

        Raises `ValueError`, and changes nothing, if a token is not in the vocabulary, or if the
        context or the whole pool is too short.
        """
        new = self.check(tokens)
        with self.slots.borrow(session) as state:
            state.append(new)
            self.check_room(len(state.token_history))
            self._feed_all_but_last(state)
        return PrefillResult(tokens_processed=len(new))

    def prompt(self, session: Session, tokens: Sequence[int], /) -> int:
        """Make `tokens` the whole history; return how many of them needn't be computed."""
        history = self.check(tokens)
        self.check_room(len(history))
        with self.slots.borrow(session) as state:
            state.reuse_prefix(history)
            return self._feed_all_but_last(state)

    def decode(self, session: Session, /) -> DecodeResult:
        """Add the likeliest next token; `ValueError` if the session is empty or its context full."""
        return self.decode_batch([session])[0]

    def decode_batch(self, sessions: Sequence[Session], /) -> list[DecodeResult]:
        """Add the next token of each session, in one pass: all of them, or none and an error."""
        with self.slots.borrow_all(sessions) as states:
            for state in states:
                self.check_room(len(state.token_history) + 1)
                self.check_not_empty(state)
            for state in states:
                self._feed_all_but_last(state)
            if not states:
                return []
            tokens = self.forward([(state, 1) for state in states]).argmax(axis=1).tolist()
            for state, token in zip(states, tokens, strict=True):
                self.settle(state, 1)
                state.append([token])
        return [DecodeResult(token=token) for token in tokens]

    def _feed_all_but_last(self, state: BorrowedState[BlockTable]) -> int:
        """Return how many tokens needn't be fed, as they are in blocks already."""
        chunks = state.chunks(self.chunk)  # If no token is pending, this uncovers the last one.
        self.reuse(state)
        reused = state.kv_length
        for tokens in chunks:
            self.forward([(state, len(tokens))])
            self.settle(state, len(tokens))
        return reused

    # What a scheduler needs, too

    def reuse(self, state: BorrowedState[BlockTable]) -> None:
        """Let a session take the blocks of its pending tokens that others have computed."""
        state.advance(self.pool.reuse(state.kv_cache, state.token_history))

    def forward(self, parts: Sequence[Part]) -> Floats:
        """Compute the next tokens of some sessions in one pass; return logits after each's last.

        Call `settle` for each of them next. If this raises, all is as before.
        """
        batch = [(state.kv_cache, _next_tokens(state, count)) for state, count in parts]
        lengths = [table.length for table, _ in batch]
        self.pool.reserve([(table, len(tokens)) for table, tokens in batch])
        try:
            return self.model.logits(self.model.forward(batch))
        except BaseException:
            for (table, _), length in zip(batch, lengths, strict=True):
                self.pool.truncate(table, length)
            raise

    def settle(self, state: BorrowedState[BlockTable], count: int) -> None:
        """Count the tokens of a pass as covered, and share the blocks that they have filled."""
        state.advance(count)
        self.pool.publish(state.kv_cache, state.token_history)

    def check(self, tokens: Sequence[int]) -> Tokens:
        """Return tokens as an array; `ValueError` if one of them isn't in the vocabulary."""
        ids = np.asarray(tokens) if len(tokens) else np.empty(0, np.int32)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            msg = "tokens must be a flat sequence of ints"
            raise ValueError(msg)
        size = self.model.config.vocab_size
        wrong = np.flatnonzero((ids < 0) | (ids >= size))
        if len(wrong):  # Tokens do not belong in a log: show the position only.
            msg = f"token {wrong[0]} of {len(ids)} (from 0) is not in the vocabulary of {size}"
            raise ValueError(msg)
        return ids.astype(np.int32)

    def check_not_empty(self, state: BorrowedState[BlockTable]) -> None:
        """Raise `ValueError` if there is no token to compute the next one from."""
        if not len(state.token_history):
            msg = "nothing to decode from: the session is empty, prefill it first"
            raise ValueError(msg)

    def check_room(self, length: int) -> None:
        """Raise `ValueError` if so many tokens could never be computed."""
        context = self.model.config.context_length
        pool = self.pool.num_blocks * self.pool.block_size
        for limit, what in ((context, "context"), (pool, "pool")):
            if length > limit:
                msg = f"{length} tokens do not fit in a {what} of {limit}"
                raise ValueError(msg)


def _next_tokens(state: BorrowedState[BlockTable], count: int) -> Tokens:
    start = state.kv_length
    return _array(state.token_history[start : start + count])


def _array(tokens: Sequence[int]) -> Tokens:
    return np.asarray(tokens, np.int32)
