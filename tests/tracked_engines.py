"""Engines that keep books of their KV caches, which no interrupt can tear.

CPython delivers interrupts on function entry, after calls and on backward jumps only. So the books are written without
any call, as in `book[END:] = (entry,)`, and `create` and `release` are C functions: a Python function could be
interrupted on entry, before it has done anything.
"""

import sys
from typing import Generic, TypeVar

from inference_session.engine import BorrowedState, StateSlots


KV = TypeVar("KV")
END = sys.maxsize


class Books(Generic[KV]):
    """All KV caches, and what became of them."""

    def __init__(self, pool: list[KV]) -> None:
        self.pool = pool
        self.left = list(reversed(pool))
        self.made: list[KV] = []  # by a step or by `truncate`
        self.released: list[KV] = []
        self.consumed: list[KV] = []  # by `truncate`

    def check(self) -> None:
        """Require every KV cache to be released or consumed exactly once."""
        created = self.pool[: len(self.pool) - len(self.left)]
        gone = [id(cache) for cache in (*self.released, *self.consumed)]
        assert len(gone) == len(set(gone)), "released twice"
        assert {id(cache) for cache in (*created, *self.made)} <= set(gone), "leaked"


class MutableCache(list[int]):
    """A KV cache that steps change."""


class Mutable:
    """An engine whose steps change the KV cache."""

    def __init__(self, *, truncates: bool, pool: int = 40) -> None:
        self.books = Books([MutableCache() for _ in range(pool)])
        self.slots = StateSlots(
            create=self.books.left.pop,
            length=len,
            truncate=self.truncate if truncates else None,
            share=self.share,
            release=self.books.released.append,
        )

    def share(self, cache: MutableCache, length: int) -> MutableCache:
        """Copy the first tokens."""
        shared = MutableCache(cache[:length])
        self.books.made[END:] = (shared,)
        return shared

    @staticmethod
    def truncate(cache: MutableCache, length: int) -> MutableCache:
        """Truncate in place."""
        del cache[length:]
        return cache

    @staticmethod
    def feed(state: BorrowedState[MutableCache], count: int) -> None:
        """Feed the next tokens, in two parts, so that an interrupt can leave one of them."""
        cache, pending = state.kv_cache, state.pending
        cache.extend(pending[: count // 2])
        cache.extend(pending[count // 2 : count])
        state.advance(count)

    @staticmethod
    def tokens(cache: MutableCache) -> list[int]:
        """Return the tokens in the cache."""
        return [*cache]


FrozenCache = tuple[int, ...]  # begins with a serial number, as there's only one `()`


class Functional:
    """An engine whose steps return a new KV cache."""

    def __init__(self, *, truncates: bool, pool: int = 40) -> None:
        self.books = Books[FrozenCache]([(serial,) for serial in range(pool)])
        self.slots = StateSlots(
            create=self.books.left.pop,
            length=self.length,
            truncate=self.truncate if truncates else None,
            release=self.books.released.append,
        )

    @staticmethod
    def length(cache: FrozenCache) -> int:
        """Don't count the serial number."""
        return len(cache) - 1

    def truncate(self, cache: FrozenCache, length: int) -> FrozenCache:
        """Return another cache; the old one is gone."""
        shorter = (*cache[: length + 1],)
        if shorter is not cache:
            books = self.books
            books.consumed[END:], books.made[END:] = (cache,), (shorter,)
        return shorter

    def feed(self, state: BorrowedState[FrozenCache], count: int) -> None:
        """Feed the next tokens, in two parts; once the library has a cache, releasing it is the library's business."""
        books, pending = self.books, state.pending
        for part in (pending[: count // 2], pending[count // 2 : count]):
            if part:
                cache = (*state.kv_cache, *part)
                state.kv_cache = cache
                books.made[END:] = (cache,)
        state.advance(count)

    @staticmethod
    def tokens(cache: FrozenCache) -> list[int]:
        """Return the tokens in the cache."""
        return [*cache[1:]]
