"""Engines that do all right, each in a way of its own. They are small enough to be made and run thousands of times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from threading import Lock
from typing import Any, Final
from uuid import UUID
from weakref import WeakKeyDictionary

from attrs import define, field

from inference_session import Session
from inference_session.engine import BorrowedState, DecodeResult, PrefillResult, StateSlots


VOCAB_SIZE: Final = 50
PRIME: Final = 1_000_003


@define(eq=False)
class Cache:
    """The KV cache of a model of two layers: what each makes of each token."""

    layers: tuple[list[int], list[int]] = field(factory=lambda: ([], []))

    @property
    def length(self) -> int:
        """How many tokens all layers cover."""
        lengths = set(map(len, self.layers))
        if len(lengths) > 1:
            raise RuntimeError("layers of different lengths")
        return lengths.pop()

    def cut(self, length: int) -> None:
        """Forget all but the first tokens."""
        for layer in self.layers:
            del layer[length:]


def forward(cache: Cache, tokens: Sequence[int], start: int | None = None) -> int:
    """Feed tokens, and return a number that depends on every one that was ever fed, and on its position."""
    out = 0
    for offset, token in enumerate(tokens):
        position = len(cache.layers[0]) if start is None else start + offset
        cache.layers[0].append(mix(token + 1, position))
        cache.layers[1].append(mix(attend(cache.layers[0]), token))
        out = attend(cache.layers[1])
    return out


def mix(left: int, right: int) -> int:
    """Return a number that depends on both."""
    return ((left * 7919 + right * 104_729 + 12_345) ** 2 // 7) % PRIME


def attend(layer: Sequence[int]) -> int:
    """Return a number that depends on all that a layer holds."""
    return mix(sum(value * (place + 3) for place, value in enumerate(layer)), len(layer))


class TinyEngine:
    """An engine like others: a cache that is changed in place, and fed in chunks."""

    chunk = 3

    def __init__(self) -> None:
        self.slots = self.make_slots()

    def make_slots(self) -> StateSlots[Any]:
        """Describe the cache."""
        return StateSlots(
            create=self.create, length=self.length, truncate=self.truncate, release=self.release
        )

    def create(self) -> Any:
        """Return a new cache."""
        return Cache()

    def length(self, cache: Any) -> int:
        """Return how many tokens a cache covers."""
        covered: int = cache.length
        return covered

    def truncate(self, cache: Any, length: int) -> Any:
        """Forget all but the first tokens."""
        cache.cut(length)
        return cache

    def release(self, cache: Any) -> None:
        """Take a cache back."""

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Add tokens, and feed all but the last."""
        self.validate(tokens)
        with self.slots.borrow(session) as state:
            state.append(tokens)
            self.feed_all_but_last(session, state)
            return PrefillResult(len(tokens))

    def decode(self, session: Session, /) -> DecodeResult:
        """Feed the last token, and add the next."""
        with self.slots.borrow(session) as state:
            return self.decode_borrowed(session, state)

    def decode_borrowed(self, session: Session, state: BorrowedState[Any]) -> DecodeResult:
        """Feed the last token, and add the next."""
        if not state.token_history:
            raise ValueError("nothing to decode from")
        self.feed_all_but_last(session, state)
        token = self.sample(session, state, self.feed(session, state, state.pending))
        state.append([token])
        return DecodeResult(token)

    def feed_all_but_last(self, session: Session, state: BorrowedState[Any]) -> None:
        """Feed what is pending, in chunks, but leave the last token."""
        for tokens in state.chunks(self.chunk):
            self.feed(session, state, tokens)

    def feed(self, session: Session, state: BorrowedState[Any], tokens: Sequence[int]) -> int:
        """Feed tokens to the model."""
        out = self.forward(session, state, tokens)
        state.advance(len(tokens))
        return out

    def forward(self, session: Session, state: BorrowedState[Any], tokens: Sequence[int]) -> int:
        """Run the model."""
        return forward(state.kv_cache, tokens)

    def sample(self, session: Session, state: BorrowedState[Any], out: int) -> int:
        """Choose a token."""
        return out % VOCAB_SIZE

    def validate(self, tokens: Sequence[int]) -> None:
        """Refuse what isn't in the vocabulary."""
        if not all(0 <= token < VOCAB_SIZE for token in tokens):
            raise ValueError("a token isn't in the vocabulary")


class WithoutTruncate(TinyEngine):
    """Its cache can't be truncated, as that of a recurrent model can't."""

    def make_slots(self) -> StateSlots[Any]:
        """Describe the cache."""
        return StateSlots(create=self.create, length=self.length, release=self.release)


class WithoutRelease(TinyEngine):
    """Its cache is freed when it's garbage, as those of most libraries are."""

    def make_slots(self) -> StateSlots[Any]:
        """Describe the cache."""
        return StateSlots(create=self.create, length=self.length, truncate=self.truncate)


class Minimal(TinyEngine):
    """It gives `StateSlots` no more than it must, and feeds everything in `decode`."""

    def make_slots(self) -> StateSlots[Any]:
        """Describe the cache."""
        return StateSlots(create=self.create, length=self.length)

    def feed_all_but_last(self, session: Session, state: BorrowedState[Any]) -> None:
        """Leave it all to `decode`, which must have something left to feed."""
        if not state.pending:
            raise ValueError("nothing is pending: there must be a token to feed")


class Functional(TinyEngine):
    """A step returns a new cache instead of changing the old one; so does `truncate`."""

    def truncate(self, cache: Cache, length: int) -> Cache:
        """Return a cache of the first tokens."""
        return Cache((cache.layers[0][:length], cache.layers[1][:length]))

    def forward(self, session: Session, state: BorrowedState[Any], tokens: Sequence[int]) -> int:
        """Run the model on a copy."""
        cache = self.truncate(state.kv_cache, state.kv_length)
        out = forward(cache, tokens)
        state.kv_cache = cache
        return out


class FunctionalWithoutTruncate(Functional):
    """As JAX's arrays: nothing is ever taken back but by having kept the old ones."""

    def make_slots(self) -> StateSlots[Any]:
        """Describe the cache."""
        return StateSlots(create=self.create, length=self.length)


class Tuples(TinyEngine):
    """Its caches are tuples; all that are empty are one and the same object, which does no harm."""

    def make_slots(self) -> StateSlots[Any]:
        """Describe the cache."""
        return StateSlots(create=tuple[int, ...], length=len)

    def forward(self, session: Session, state: BorrowedState[Any], tokens: Sequence[int]) -> int:
        """Return a new tuple."""
        cache = Cache()
        out = forward(cache, [*state.kv_cache, *tokens])
        state.kv_cache = (*state.kv_cache, *tokens)
        return out


class Handles(TinyEngine):
    """Its caches are in one place, and what a session has is a number, as in llama.cpp; there are few of them."""

    def __init__(self) -> None:
        super().__init__()
        self.caches: dict[int, Cache] = {}
        self.free = list(range(8))

    def create(self) -> int:
        """Take a handle."""
        if not self.free:
            raise MemoryError("out of handles")
        handle = self.free.pop()
        self.caches[handle] = Cache()
        return handle

    def length(self, cache: int) -> int:
        """Return how many tokens are behind a handle."""
        return self.caches[cache].length

    def truncate(self, cache: int, length: int) -> int:
        """Forget all but the first tokens."""
        self.caches[cache].cut(length)
        return cache

    def release(self, cache: int) -> None:
        """Give a handle back."""
        del self.caches[cache]
        self.free.append(cache)

    def forward(self, session: Session, state: BorrowedState[Any], tokens: Sequence[int]) -> int:
        """Run the model."""
        return forward(self.caches[state.kv_cache], tokens)


class Marked(TinyEngine):
    """Its caches know whose they are, and a step makes sure of it."""

    def __init__(self) -> None:
        super().__init__()
        self.owners: WeakKeyDictionary[Cache, UUID] = WeakKeyDictionary()

    def forward(self, session: Session, state: BorrowedState[Any], tokens: Sequence[int]) -> int:
        """Run the model, on the session's own cache."""
        if self.owners.setdefault(state.kv_cache, session.id) != session.id:
            raise RuntimeError("another session's cache")
        return super().forward(session, state, tokens)


class Batched(TinyEngine):
    """It decodes as a batch of one."""

    def decode(self, session: Session, /) -> DecodeResult:
        """Feed the last token, and add the next."""
        with self.slots.borrow_all([session]) as (state,):
            return self.decode_borrowed(session, state)


class Locked(TinyEngine):
    """Its model can do one step at a time; the others wait, but not those whose session is busy."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = Lock()

    def forward(self, session: Session, state: BorrowedState[Any], tokens: Sequence[int]) -> int:
        """Run the model."""
        with self.lock:
            return super().forward(session, state, tokens)


class Sampling(TinyEngine):
    """It draws tokens by chance, which depends on the session's id and the position only."""

    def sample(self, session: Session, state: BorrowedState[Any], out: int) -> int:
        """Draw a token."""
        return chance(session.id, len(state.token_history), out)


class Patient(TinyEngine):
    """It makes up for a lack of memory, and tries again."""

    def decode(self, session: Session, /) -> DecodeResult:
        """Feed the last token, and add the next."""
        try:
            return super().decode(session)
        except MemoryError:
            return super().decode(session)


def chance(session_id: UUID, position: int, out: int) -> int:
    """Draw a token that's one of two, most of the time."""
    random = Random(f"{session_id} {position}")
    return random.choice((out, out // VOCAB_SIZE)) % VOCAB_SIZE


RIGHT: Final[Sequence[Callable[[], TinyEngine]]] = (
    TinyEngine,
    WithoutTruncate,
    WithoutRelease,
    Minimal,
    Functional,
    FunctionalWithoutTruncate,
    Tuples,
    Handles,
    Marked,
    Batched,
    Locked,
    Sampling,
    Patient,
)
