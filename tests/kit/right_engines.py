"""Engines that do all right, each in a way of its own. They are small enough to be made and run thousands of times."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from threading import Lock
from typing import Any, BinaryIO, ClassVar, Final
from uuid import UUID
from weakref import WeakKeyDictionary

from attrs import define, field

from inference_session import Session
from inference_session.engine import TORN, BorrowedState, DecodeResult, PrefillResult, StateSlots


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
    options: ClassVar[dict[str, Any]] = {}
    """What the kit is told of it."""

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


class Batching(TinyEngine):
    """It decodes batches, too."""

    def decode_batch(self, sessions: Sequence[Session], /) -> Sequence[DecodeResult]:
        """Feed the last token of each, and add the next."""
        with self.slots.borrow_all(sessions) as states:
            if not all(len(state.token_history) for state in states):
                raise ValueError("nothing to decode from")
            for state in states:
                self.feed_all_but_last(state.session, state)
            rows = [state.pending for state in states]
            outs = self.forward_batch(states, rows)
            return [
                self.finish(state, row, out)
                for state, row, out in zip(states, rows, outs, strict=True)
            ]

    def forward_batch(
        self, states: Sequence[BorrowedState[Any]], rows: Sequence[Sequence[int]]
    ) -> list[int]:
        """Run the model on all rows."""
        return [
            self.forward(state.session, state, row) for state, row in zip(states, rows, strict=True)
        ]

    def finish(self, state: BorrowedState[Any], row: Sequence[int], out: int) -> DecodeResult:
        """Add the token that the model gave for a row."""
        state.advance(len(row))
        token = self.sample(state.session, state, out)
        state.append([token])
        return DecodeResult(token)


class Filing(TinyEngine):
    """Its caches can be copied, written to files and read from them."""

    def make_slots(self) -> StateSlots[Any]:
        """Describe the cache."""
        return StateSlots(
            create=self.create,
            length=self.length,
            truncate=self.truncate,
            share=self.share,
            dump=self.dump,
            load=self.load,
            release=self.release,
        )

    def share(self, cache: Any, length: int) -> Any:
        """Copy the first tokens."""
        return Cache((cache.layers[0][:length], cache.layers[1][:length]))

    def dump(self, cache: Any, file: BinaryIO) -> None:
        """Write both layers."""
        file.write(json.dumps(cache.layers).encode())

    def load(self, file: BinaryIO) -> Any:
        """Read both layers."""
        first, second = json.loads(file.read())
        return Cache((first, second))


def taken(engine: StaticCaches) -> int:
    """Return how many caches sessions have."""
    return 8 - len(engine.free)


class StaticCaches(TinyEngine):
    """It has as many caches as it will ever need, each with room for all tokens; a session has the number of one."""

    room = 64
    options: ClassVar[dict[str, Any]] = {"held": taken}

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[tuple[list[int], list[int]]] = [
            ([0] * self.room, [0] * self.room) for _ in range(8)
        ]
        self.used = [0] * 8
        self.free = list(range(8))

    def create(self) -> int:
        """Take a cache, and use it from its beginning."""
        cache = self.free.pop()
        self.used[cache] = 0
        return cache

    def length(self, cache: int) -> int:
        """Return how much of a cache is used."""
        return self.used[cache]

    def truncate(self, cache: int, length: int) -> int:
        """Use less of it."""
        self.used[cache] = length
        return cache

    def release(self, cache: int) -> None:
        """Give a cache back."""
        self.free.append(cache)

    def forward(self, session: Session, state: BorrowedState[Any], tokens: Sequence[int]) -> int:
        """Run the model on what is used, and write its new entries behind that."""
        number: int = state.kv_cache
        used, (first, second) = self.used[number], self.layers[number]
        cache = Cache((first[:used], second[:used]))
        out = forward(cache, tokens)
        first[: len(cache.layers[0])], second[: len(cache.layers[1])] = cache.layers
        self.used[number] = used + len(tokens)
        return out


class SlidingWindow(TinyEngine):
    """Its model looks at the last tokens only, and its caches hold no others."""

    window = 10

    def create(self) -> WindowCache:
        """Return a new cache."""
        return WindowCache()

    def length(self, cache: WindowCache) -> int:
        """Return how many tokens were fed."""
        return cache.count

    def truncate(self, cache: WindowCache, length: int) -> WindowCache:
        """Cut the window, if it hasn't moved yet; begin anew if it has."""
        kept = length if cache.count <= self.window or length == cache.count else 0
        if kept < cache.count:
            cache.cut(kept)
            cache.count = kept
        return cache

    def forward(self, session: Session, state: BorrowedState[Any], tokens: Sequence[int]) -> int:
        """Run the model, and forget what has left the window."""
        out, cache = 0, state.kv_cache
        for token in tokens:
            out = forward(cache, [token], cache.count % self.window)
            cache.count += 1
            for layer in cache.layers:
                del layer[: -self.window]
        return out

    def feed(self, session: Session, state: BorrowedState[Any], tokens: Sequence[int]) -> int:
        """Feed tokens; if that fails, nobody knows what has left the window."""
        cache = state.kv_cache
        try:
            return super().feed(session, state, tokens)
        except BaseException:
            cache.cut(0)
            cache.count = 0
            raise


@define(eq=False)
class WindowCache(Cache):
    """The last entries of a cache, and how many there were."""

    count: int = 0


class RecurrentLayer:
    """A layer that keeps one number, whatever the length."""

    @staticmethod
    def forward(cache: HybridCache, token: int) -> int:
        """Feed a token."""
        cache.state = mix(cache.state + 1, token)
        return cache.state


class AttentionLayer:
    """A layer that keeps an entry for each token."""

    @classmethod
    def forward(cls, cache: HybridCache, value: int) -> int:
        """Feed what the layer below made of a token."""
        cache.attention.append(value)
        return attend(cache.attention)


@define(eq=False)
class HybridCache:
    """The state of a recurrent layer, with some earlier ones, and the entries of an attention layer."""

    state: int = 0
    attention: list[int] = field(factory=list[int])
    count: int = 0
    earlier: dict[int, int] = field(factory=lambda: {0: 0})

    def go_back(self, length: int) -> None:
        """Go back to the last state kept that covers at most so many tokens."""
        self.count = max(count for count in self.earlier if count <= length)
        self.state = self.earlier[self.count]
        self.earlier = {count: it for count, it in self.earlier.items() if count <= self.count}
        del self.attention[self.count :]


class Hybrid(TinyEngine):
    """Its model has a recurrent layer below an attention layer."""

    options: ClassVar[dict[str, Any]] = {
        "fail_in": [(RecurrentLayer, "forward"), (AttentionLayer, "forward")]
    }

    def create(self) -> HybridCache:
        """Return a new cache."""
        return HybridCache()

    def length(self, cache: HybridCache) -> int:
        """Return how many tokens are covered, unless a step has failed between two layers."""
        return cache.count

    def truncate(self, cache: HybridCache, length: int) -> HybridCache:
        """Go back to a state that was kept."""
        cache.go_back(length)
        return cache

    def forward(self, session: Session, state: BorrowedState[Any], tokens: Sequence[int]) -> int:
        """Run the model, and keep every fourth state."""
        cache, out = state.kv_cache, 0
        covered, cache.count = cache.count, TORN
        for count, token in enumerate(tokens, covered + 1):
            out = AttentionLayer.forward(cache, RecurrentLayer.forward(cache, token))
            if count % 4 == 0:
                cache.earlier[count] = cache.state
        cache.count = covered + len(tokens)
        return out


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
    Batching,
    Filing,
    StaticCaches,
    SlidingWindow,
    Hybrid,
)
