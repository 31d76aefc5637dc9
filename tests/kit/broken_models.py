"""More of the catalogue: batches, hybrid models, windows, long histories, threads, branches and files."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any, BinaryIO, ClassVar, cast

from attrs import define
from tests.kit.catalogue import caught_by
from tests.kit.right_engines import (
    VOCAB_SIZE,
    Batching,
    Cache,
    Filing,
    Functional,
    Handles,
    Hybrid,
    HybridCache,
    Minimal,
    SlidingWindow,
    StaticCaches,
    TinyEngine,
    WindowCache,
    WithoutRelease,
    attend,
    forward,
    mix,
)

from inference_session import Session
from inference_session.engine import BorrowedState, DecodeResult, PrefillResult, StateSlots
from inference_session.exceptions import SessionBusyError, SessionError


State = BorrowedState[Any]
Sessions = Sequence[Session]
Results = Sequence[DecodeResult]


# Batches


@caught_by("batches")
class RowsMixedUp(Batching):
    """Rows are sorted by their length, and the results are left in that order."""

    def decode_batch(self, sessions: Sessions, /) -> Results:
        """Decode, the longest first."""
        return super().decode_batch(sorted(sessions, key=lambda it: -it.token_count))


@caught_by("batches", "failure_in_a_batch")
class PositionsOfTheFirst(Batching):
    """All rows get the positions of the first one."""

    def forward_batch(self, states: Sequence[State], rows: Sequence[Sequence[int]]) -> list[int]:
        """Run the model on all rows, from one position on."""
        start = states[0].kv_length
        return [
            forward(state.kv_cache, row, start) for state, row in zip(states, rows, strict=True)
        ]


@caught_by("batches")
class PaddingAttended(Batching):
    """Shorter rows are filled up with tokens that the model attends to."""

    def forward_batch(self, states: Sequence[State], rows: Sequence[Sequence[int]]) -> list[int]:
        """Run the model on all rows, and on as many zeros as the longest is longer."""
        longest = max(state.kv_length for state in states)
        outs = super().forward_batch(states, rows)
        for place, state in enumerate(states):
            if state.kv_length < longest:
                outs[place] = mix(outs[place], 0)
        return outs


@caught_by("batches")
class LongestRowOnly(Batching):
    """All rows are thought to be as long as the longest, and begin with zeros."""

    def forward_batch(self, states: Sequence[State], rows: Sequence[Sequence[int]]) -> list[int]:
        """Run the model, with positions counted from the end."""
        longest = max(state.kv_length for state in states)
        return [
            forward(state.kv_cache, row, longest) for state, row in zip(states, rows, strict=True)
        ]


@caught_by("batches")
class OneResultForAll(Batching):
    """The token of the last row is everybody's."""

    def decode_batch(self, sessions: Sessions, /) -> Results:
        """Decode, and return one result many times."""
        results = super().decode_batch(sessions)
        return [results[-1] for _ in results]


@caught_by("batches")
class EqualRowsOnce(Batching):
    """Sessions with the same last token are decoded once."""

    def forward_batch(self, states: Sequence[State], rows: Sequence[Sequence[int]]) -> list[int]:
        """Run the model, and use results again."""
        known: dict[int, int] = {}
        outs = super().forward_batch(states, rows)
        return [known.setdefault(row[-1] % 3, out) for row, out in zip(rows, outs, strict=True)]


@caught_by("batches")
class FourRowsAtMost(Batching):
    """A batch has four rows at most; the others get no result."""

    def decode_batch(self, sessions: Sessions, /) -> Results:
        """Decode the first four."""
        return super().decode_batch(sessions[:4])


@caught_by("batches")
class PendingForgotten(Batching):
    """A batch feeds the last token of each session, whatever else is pending."""

    def forward_batch(self, states: Sequence[State], rows: Sequence[Sequence[int]]) -> list[int]:
        """Run the model on one token of each row."""
        return super().forward_batch(states, [row[-1:] for row in rows])

    def decode_batch(self, sessions: Sessions, /) -> Results:
        """Decode, without feeding anything first."""
        with self.slots.borrow_all(sessions) as states:
            rows = [state.pending for state in states]
            outs = self.forward_batch(states, rows)
            return [
                self.finish(state, row, out)
                for state, row, out in zip(states, rows, outs, strict=True)
            ]


@caught_by("batches")
class RowsOfTheLastBatch(Batching):
    """The caches of the last batch are kept, and used again if the next has as many rows."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    def forward_batch(self, states: Sequence[State], rows: Sequence[Sequence[int]]) -> list[int]:
        """Run the model, and mix in what the last batch had."""
        kept = self.kept if len(self.kept) == len(rows) else [None] * len(rows)
        self.kept = [state.session.id for state in states]
        outs = super().forward_batch(states, rows)
        return [
            out if before in (None, state.session.id) else out + 1
            for state, before, out in zip(states, kept, outs, strict=True)
        ]


@caught_by("failure_in_a_batch", "bad_batches_are_refused")
class OneByOne(Batching):
    """A batch is decoded one by one: if a session fails, those before it have gone on."""

    def decode_batch(self, sessions: Sessions, /) -> Results:
        """Decode each."""
        return [self.decode(session) for session in sessions]


@caught_by("failure_in_a_batch")
class CommitsRows(Batching):
    """Each row is committed when it's done, and stays if a later one fails."""

    def finish(self, state: State, row: Sequence[int], out: int) -> DecodeResult:
        """Finish, and commit."""
        result = super().finish(state, row, out)
        state.commit()
        return result


@caught_by("bad_batches_are_refused")
class BadRowsSkipped(Batching):
    """Sessions that can't be decoded are left out."""

    def decode_batch(self, sessions: Sessions, /) -> Results:
        """Decode those that can be."""
        good = [it for it in sessions if it.token_count and not it.closed and not it.borrowed]
        return super().decode_batch(good)


@caught_by("bad_batches_are_refused")
class SameSessionTwice(Batching):
    """A session that is in a batch twice is decoded once."""

    def decode_batch(self, sessions: Sessions, /) -> Results:
        """Decode each session once."""
        once = list(dict.fromkeys(sessions))
        found = dict(zip(once, super().decode_batch(once), strict=True))
        return [found[session] for session in sessions]


@caught_by("bad_batches_are_refused")
class BusyBatchIsARuntimeError(Batching):
    """A batch with a session that can't be borrowed ends in some error."""

    def decode_batch(self, sessions: Sessions, /) -> Results:
        """Decode."""
        try:
            return super().decode_batch(sessions)
        except SessionError as error:
            raise RuntimeError("the batch failed") from error


@caught_by("bad_batches_are_refused", "failure_in_a_batch")
class FlagOfTheBatchNotReset(Batching):
    """A flag says that a batch is under way; one that fails leaves it set."""

    def __init__(self) -> None:
        super().__init__()
        self.busy = False

    def decode_batch(self, sessions: Sessions, /) -> Results:
        """Decode, if no batch is under way."""
        if self.busy:
            raise RuntimeError("busy")
        self.busy = True
        results = super().decode_batch(sessions)
        self.busy = False
        return results


@caught_by("bad_batches_are_refused")
class EmptyRowIsAnIndexError(Batching):
    """A session without tokens in a batch ends in some error of the model."""

    def decode_batch(self, sessions: Sessions, /) -> Results:
        """Look at the last tokens, which there must be."""
        with self.slots.borrow_all(sessions) as states:
            assert all(state.token_history[-1] >= 0 for state in states)
        return super().decode_batch(sessions)


# Inside the model


@caught_by("failure_in_the_model")
class RecurrentStateAhead(Hybrid):
    """Only the attention layer is looked at: after a failure between two layers, the other one is a token ahead."""

    def length(self, cache: HybridCache) -> int:
        """Return the length of the attention layer."""
        return len(cache.attention)

    def truncate(self, cache: HybridCache, length: int) -> HybridCache:
        """Go back, unless nothing has to be cut."""
        if length < len(cache.attention):
            cache.go_back(length)
        return cache

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model, for the length that its attention layer has."""
        state.kv_cache.count = len(state.kv_cache.attention)
        return super().forward(session, state, tokens)


@caught_by("failure_in_the_model", "failure_before_advance", "rewind")
class RecurrentStateNotCut(Hybrid):
    """What is cut is the attention layer only."""

    def truncate(self, cache: HybridCache, length: int) -> HybridCache:
        """Cut the attention layer."""
        del cache.attention[length:]
        cache.count = length
        return cache


@caught_by("shared_beginnings")
class CheckpointAliased(Hybrid):
    """The states that were kept aren't dropped by going back, and are found by a length that has other tokens now."""

    def truncate(self, cache: HybridCache, length: int) -> HybridCache:
        """Go back, and keep what is ahead."""
        earlier = dict(cache.earlier)
        cache.go_back(length)
        cache.earlier = earlier
        return cache

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model; a state that is kept already isn't kept anew."""
        earlier = dict(state.kv_cache.earlier)
        out = super().forward(session, state, tokens)
        state.kv_cache.earlier.update(earlier)
        return out


@caught_by("rewind", "reuse_prefix")
class CheckpointTooLate(Hybrid):
    """The state that is kept for a length is the one of a token later."""

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model, and keep states one place off."""
        out = super().forward(session, state, tokens)
        earlier = state.kv_cache.earlier
        state.kv_cache.earlier = {count - (count > 0): it for count, it in earlier.items()}
        return out


class Norm:
    """A part of a model that keeps something from one call to the next."""

    def __init__(self) -> None:
        self.scratch: list[int] = []

    def scale(self, value: int) -> int:
        """Scale a number, with a scratch pad that is empty again afterwards."""
        self.scratch.append(value)
        out = self.finish(sum(self.scratch))
        self.scratch.pop()
        return out

    def finish(self, value: int) -> int:
        """Do the last part of it."""
        return mix(value, 3)


@caught_by("failure_in_the_model")
class ScratchPadNotCleared(TinyEngine):
    """The model has a scratch pad, which a failure in its midst leaves full."""

    options: ClassVar[dict[str, Any]] = {"fail_in": [(Norm, "finish")]}

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()

    def sample(self, session: Session, state: State, out: int) -> int:
        """Choose a token by what is scaled."""
        return self.norm.scale(out) % VOCAB_SIZE


class Layers:
    """Both layers of the model, one after the other."""

    @staticmethod
    def first(cache: Cache, token: int) -> None:
        """Run the first."""
        cache.layers[0].append(mix(token + 1, len(cache.layers[0])))

    @staticmethod
    def second(cache: Cache, token: int) -> int:
        """Run the second."""
        cache.layers[1].append(mix(attend(cache.layers[0]), token))
        return attend(cache.layers[1])


@caught_by("failure_in_the_model")
class LengthOfTheLastLayer(TinyEngine):
    """Length and truncation go by the last layer: after a failure before it, the first has an entry more."""

    options: ClassVar[dict[str, Any]] = {"fail_in": [(Layers, "second")]}

    def length(self, cache: Cache) -> int:
        """Return what the last layer covers."""
        return len(cache.layers[1])

    def truncate(self, cache: Cache, length: int) -> Cache:
        """Cut both, if the last is too long."""
        if len(cache.layers[1]) > length:
            cache.cut(length)
        return cache

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run both layers on each token."""
        out = 0
        for token in tokens:
            Layers.first(state.kv_cache, token)
            out = Layers.second(state.kv_cache, token)
        return out


# Windows and long histories


@caught_by("decode_from_the_cache")
class LosesTheBlockBefore(TinyEngine):
    """What is older than the present block of 16 is lost when a token is decoded."""

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model on a part of the cache."""
        cache: Cache = state.kv_cache
        if len(tokens) > 1 or cache.length <= 16:
            return forward(cache, tokens)
        start = cache.length - cache.length % 16
        part = Cache((cache.layers[0][start:], cache.layers[1][start:]))
        out = forward(part, tokens, cache.length)
        for layer, new in zip(cache.layers, part.layers, strict=True):
            layer.extend(new[-len(tokens) :])
        return out


@caught_by("decode_from_the_cache")
class WindowOfForty(TinyEngine):
    """A window of 40 tokens is there in decode only."""

    window = 40

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model on the window."""
        cache: Cache = state.kv_cache
        if len(tokens) > 1:
            return forward(cache, tokens)
        window = Cache((cache.layers[0][-self.window :], cache.layers[1][-self.window :]))
        out = forward(window, tokens, cache.length)
        for layer, new in zip(cache.layers, window.layers, strict=True):
            layer.append(new[-1])
        return out


@caught_by("decode_from_the_cache")
class PositionsOtherBeyond32(TinyEngine):
    """Beyond 32 tokens, positions are computed in another way, and what was cached isn't (Phi-3 with LongRoPE)."""

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model, with positions that depend on how long all is."""
        offset = 1000 if len(state.token_history) > 32 else 0
        return forward(state.kv_cache, tokens, state.kv_length + offset)


@caught_by("shared_beginnings")
class QuantisedAt24(TinyEngine):
    """Once a cache has 24 tokens, it is rounded; one that is filled at once isn't (huggingface's QuantizedCache)."""

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model, and round what is long enough, as it was when it got there."""
        cache: Cache = state.kv_cache
        before = cache.length
        out = forward(cache, tokens)
        if before < 24 <= cache.length and len(tokens) == 1:
            for layer in cache.layers:
                layer[:] = [value // 4 * 4 for value in layer]
        return out


@caught_by("prefill_in_pieces")
class LimitOf28(TinyEngine):
    """A buffer has room for 28 tokens, and what comes then is dropped without a word."""

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Prefill what there is room for."""
        super().prefill(session, tokens[: max(28 - session.token_count, 0)])
        return PrefillResult(len(tokens))


@caught_by("prefill_in_pieces", "decode_from_the_cache")
class PositionsWrapAt32(TinyEngine):
    """Positions beyond 32 are kept in too few bits, but only when tokens come one by one."""

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model."""
        start = state.kv_length % 32 if len(tokens) == 1 else state.kv_length
        return forward(state.kv_cache, tokens, start)


@caught_by("rewind")
class WindowCutTooFar(SlidingWindow):
    """A window that has moved on is cut all the same: what has left it is missing (Blaizzy/mlx-vlm#1715)."""

    def truncate(self, cache: WindowCache, length: int) -> WindowCache:
        """Cut the window."""
        surplus = cache.count - length
        for layer in cache.layers:
            del layer[max(len(layer) - surplus, 0) :]
        cache.count = length
        return cache


@caught_by("rewind", "reuse_prefix")
class WindowCountsOnly(SlidingWindow):
    """Only the count goes back, and the window stays where it was (ml-explore/mlx-swift-lm#424)."""

    def truncate(self, cache: WindowCache, length: int) -> WindowCache:
        """Set the count."""
        cache.count = length
        return cache


@caught_by("failure_before_advance")
class WindowNotTakenBack(SlidingWindow):
    """After a failed step, the window is cut as if it had not moved meanwhile."""

    window = 4

    def feed(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Feed tokens."""
        return TinyEngine.feed(self, session, state, tokens)

    def truncate(self, cache: WindowCache, length: int) -> WindowCache:
        """Cut the window, if it hasn't moved far."""
        if cache.count - length < self.window:
            for layer in cache.layers:
                del layer[len(layer) - (cache.count - length) :]
        else:
            cache.cut(0)
            length = 0
        cache.count = length
        return cache


# Full caches, short cuts, keys


@caught_by("decode_from_a_full_cache")
class NothingPendingIsAnIndexError(TinyEngine):
    """Decoding takes for granted that something is pending."""

    def feed_all_but_last(self, session: Session, state: State) -> None:
        """Feed in chunks what is pending, all but the last."""
        pending = state.pending[:-1]
        for start in range(0, len(pending), self.chunk):
            self.feed(session, state, pending[start : start + self.chunk])

    def feed(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Feed tokens, of which there is at least one."""
        assert tokens[-1] >= 0
        return super().feed(session, state, tokens)


@caught_by("decode_from_a_full_cache")
class NothingPendingIsZero(TinyEngine):
    """If nothing is pending, the model is run on nothing, and what comes out is taken for a result."""

    def feed_all_but_last(self, session: Session, state: State) -> None:
        """Feed in chunks what is pending, all but the last."""
        pending = state.pending[:-1]
        for start in range(0, len(pending), self.chunk):
            self.feed(session, state, pending[start : start + self.chunk])


@caught_by("decode_from_a_full_cache")
class LastTokenFedAgain(NothingPendingIsZero):
    """If nothing is pending, the last token is fed again."""

    def feed(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Feed tokens, or the last one."""
        if tokens:
            return super().feed(session, state, tokens)
        cache: Cache = state.kv_cache
        out = self.forward(session, state, state.token_history[-1:])
        cache.cut(state.kv_length)
        return out


@caught_by("truncate_falls_short", "decode_from_the_cache")
class LastTokenOnly(TinyEngine):
    """Decode feeds the last token, and believes that all others are in the cache."""

    def decode_borrowed(self, session: Session, state: State) -> DecodeResult:
        """Feed the last token, and add the next."""
        if not state.token_history:
            raise ValueError("nothing to decode from")
        out = self.feed(session, state, state.token_history[-1:])
        token = self.sample(session, state, out)
        state.append([token])
        return DecodeResult(token)


@caught_by("truncate_falls_short")
class RewindsByItself(TinyEngine):
    """The engine counts what is in the cache by itself, and believes that it is cut where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.short: set[int] = set()

    def truncate(self, cache: Cache, length: int) -> Cache:
        """Cut, and note what is left."""
        cache.cut(length)
        return cache

    def decode_borrowed(self, session: Session, state: State) -> DecodeResult:
        """Decode, if no more than two tokens are pending, as it always was."""
        if state.kv_length and len(state.pending) > 2:
            raise RuntimeError("too much is pending")
        return super().decode_borrowed(session, state)


class Keyed(TinyEngine):
    """An engine with one adapter, by whose name it borrows: no bug yet."""

    def decode(self, session: Session, /) -> DecodeResult:
        """Decode, under a key."""
        with self.slots.borrow(session, key="adapter") as state:
            return self.decode_borrowed(session, state)

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Prefill, under a key."""
        self.validate(tokens)
        with self.slots.borrow(session, key="adapter") as state:
            state.append(tokens)
            self.feed_all_but_last(session, state)
            return PrefillResult(len(tokens))


@caught_by("key_changes", "decode_from_the_cache")
class CoverageBesideTheSession(Keyed):
    """How much a cache covers is counted beside it, so that a new one is taken for full."""

    def __init__(self) -> None:
        super().__init__()
        self.covered: dict[Session, int] = {}

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model at the place where the session was last."""
        start = self.covered.get(session, 0)
        self.covered[session] = start + len(tokens)
        return forward(state.kv_cache, tokens, start)


@caught_by("key_changes")
class CacheFoundByTokens(Keyed):
    """What was computed last is kept by its tokens, and used for a session whose cache was released."""

    def __init__(self) -> None:
        super().__init__()
        self.latest: tuple[list[int], list[list[int]]] = ([], [])

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model, from what is kept if the cache is new."""
        history, layers = self.latest
        fed = list(state.token_history[: state.kv_length + len(tokens)])
        if state.kv_length == 0 and history[: len(fed)] == fed and len(history) > len(fed):
            state.kv_cache.layers[0].extend(layers[0][: len(fed)])
            state.kv_cache.layers[1].extend(reversed(layers[1][: len(fed)]))
            return attend(state.kv_cache.layers[1])
        out = super().forward(session, state, tokens)
        self.latest = (fed, [list(layer) for layer in state.kv_cache.layers])
        return out


# Two threads


@caught_by("two_threads_on_two_sessions")
class TokensInTheEngine(TinyEngine):
    """What a step feeds is kept in the engine for a moment, and another step comes in between."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: Sequence[int] = ()

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model on the tokens that the engine has."""
        self.tokens = list(tokens)
        cache = state.kv_cache
        return forward(cache, self.tokens)


@caught_by("two_threads_on_two_sessions")
class ResultInTheEngine(TinyEngine):
    """What the model gave is kept in the engine for a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.out = 0

    def feed(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Feed, and return what the engine has."""
        self.out = self.forward(session, state, tokens)
        state.advance(len(tokens))
        return self.out


@caught_by("two_threads_on_two_sessions")
class OneStepAtATime(TinyEngine):
    """A second step of another session is refused, as if it were the same one."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model, if nobody else does."""
        if not self.lock.acquire(blocking=False):
            raise SessionBusyError(session.id)
        try:
            return super().forward(session, state, tokens)
        finally:
            self.lock.release()


@caught_by("two_threads_on_two_sessions")
class PresentSession(TinyEngine):
    """The engine notes whose step it is, and looks that up when it samples."""

    def __init__(self) -> None:
        super().__init__()
        self.present: Session | None = None

    def decode_borrowed(self, session: Session, state: State) -> DecodeResult:
        """Note the session, and decode."""
        self.present = session
        return super().decode_borrowed(session, state)

    def sample(self, session: Session, state: State, out: int) -> int:
        """Choose a token, if it is for this session."""
        return (out + (self.present is not session)) % VOCAB_SIZE


# Branches and files


@caught_by("branches")
class ShareReturnsItself(Filing):
    """A branch gets the very cache of its parent."""

    def share(self, cache: Cache, length: int) -> Cache:
        """Return it."""
        return cache


@caught_by("branches")
class LayersShared(Filing):
    """A branch has the lists of its parent, if it has all of its tokens."""

    def make_slots(self) -> StateSlots[Any]:
        """Describe the cache."""
        return StateSlots(
            create=self.create, length=self.length, truncate=self.truncate, share=self.share
        )

    def share(self, cache: Cache, length: int) -> Cache:
        """Return a cache of the same lists, as far as that is possible."""
        if cache.length == length:
            return Cache(cache.layers)
        return cast("Cache", super().share(cache, length))


@caught_by("branches")
class ShareKeepsTheLast(Filing):
    """A branch gets the last tokens instead of the first."""

    def share(self, cache: Cache, length: int) -> Cache:
        """Return the last entries."""
        return Cache((cache.layers[0][-length:], cache.layers[1][-length:]))


@caught_by("branches")
class SecondLayerShared(Filing):
    """One of the layers isn't copied."""

    def share(self, cache: Cache, length: int) -> Cache:
        """Copy the first layer, and cut the second."""
        del cache.layers[1][length:]
        return Cache((cache.layers[0][:length], cache.layers[1]))

    def length(self, cache: Cache) -> int:
        """Return what the first layer covers."""
        return len(cache.layers[0])


@caught_by("save_and_restore")
class DumpsTheFirstLayer(Filing):
    """What is written is one layer, twice."""

    def dump(self, cache: Cache, file: BinaryIO) -> None:
        """Write a layer, twice."""
        file.write(json.dumps([cache.layers[0], cache.layers[0]]).encode())


@caught_by("save_and_restore")
class DumpsTheHandle(Handles):
    """What is written is a handle, which means nothing elsewhere."""

    def make_slots(self) -> StateSlots[Any]:
        """Describe the cache."""
        return StateSlots(
            create=self.create,
            length=self.length,
            truncate=self.truncate,
            release=self.release,
            dump=self.dump,
            load=self.load,
        )

    def dump(self, cache: int, file: BinaryIO) -> None:
        """Write the handle."""
        file.write(str(cache).encode())

    def load(self, file: BinaryIO) -> int:
        """Return the handle, with what's behind it."""
        return int(file.read())


@caught_by("save_and_restore")
class LoadReturnsNothing(Filing):
    """What is read back is an empty cache."""

    def load(self, file: BinaryIO) -> Cache:
        """Return a new cache."""
        file.read()
        return Cache()


@caught_by("save_and_restore")
class LoadLosesPrecision(Filing):
    """What is written is rounded."""

    def dump(self, cache: Cache, file: BinaryIO) -> None:
        """Write in steps of eight."""
        rounded = [[value // 8 * 8 for value in layer] for layer in cache.layers]
        file.write(json.dumps(rounded).encode())


@caught_by("save_and_restore")
class LoadKeepsTheFile(Filing):
    """What is read is kept, and found by the file's size for the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Cache] = {}

    def dump(self, cache: Cache, file: BinaryIO) -> None:
        """Write, and cut the cache as if it were gone."""
        super().dump(cache, file)
        for layer in cache.layers:
            layer.reverse()


@caught_by("save_and_restore")
class LoadRaises(Filing):
    """What was written can't be read back."""

    def load(self, file: BinaryIO) -> Cache:
        """Look for something else."""
        first, second = json.loads(file.read())["layers"]
        return Cache((first, second))


# Pools of static caches


@caught_by("tokens_reach_the_session", "close_releases_once")
class StaticCacheNotGivenBack(StaticCaches):
    """A cache that is given back isn't free."""

    def release(self, cache: int) -> None:
        """Forget it."""


@caught_by("decode_from_the_cache", "close_releases_once")
class StaticCacheNotReset(StaticCaches):
    """A cache that is taken again is as full as it was."""

    def create(self) -> int:
        """Take a cache."""
        return self.free.pop()


@caught_by("decode_from_the_cache", "rewind")
class StaticRestAttended(StaticCaches):
    """The model also looks at what is behind the part in use."""

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model, and look a little further."""
        number: int = state.kv_cache
        behind = self.layers[number][0][self.used[number] : self.used[number] + 2]
        return super().forward(session, state, tokens) + sum(behind)


@caught_by("sessions_interleaved", "close_releases_once")
class StaticCachesOverlap(StaticCaches):
    """Of two neighbours, one begins where the other one isn't over yet."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [self.layers[number // 2] for number in range(8)]


@caught_by("failure_before_advance", "dropped_session_is_released")
class FreedOnClose(StaticCaches):
    """A cache is given back by whoever closes a session, and never if that happens otherwise."""

    def make_slots(self) -> StateSlots[Any]:
        """Describe the cache, but for how to release it."""
        return StateSlots(create=self.create, length=self.length)

    def decode(self, session: Session, /) -> DecodeResult:
        """Decode."""
        return super().decode(session)


# Functional caches


@caught_by("two_threads_on_two_sessions", "shared_beginnings")
class CacheOfTheLastStep(Functional):
    """The next step begins with the cache that the last one returned, whoever's that was."""

    def __init__(self) -> None:
        super().__init__()
        self.latest = Cache()

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model on what the engine has, if it is as long."""
        present: Cache = state.kv_cache
        source = self.latest if self.latest.length == present.length else present
        cache = Cache((list(source.layers[0]), list(source.layers[1])))
        out = forward(cache, tokens)
        self.latest = Cache((list(cache.layers[0]), list(cache.layers[1])))
        state.kv_cache = cache
        return out


@define(eq=False)
class Donated(Cache):
    """A cache that can't be used any more once it was given to the model."""

    donated: bool = False


@caught_by("failure_before_advance")
class DonatesTheOld(WithoutRelease):
    """The old cache's memory becomes the new one's, so that there is nothing to go back to (donated buffers of JAX)."""

    def make_slots(self) -> StateSlots[Any]:
        """Describe the cache, which is never changed in place, as one believes."""
        return StateSlots(create=self.create, length=self.length, truncate=self.truncate)

    def create(self) -> Donated:
        """Return a new cache."""
        return Donated()

    def truncate(self, cache: Donated, length: int) -> Donated:
        """Return a cache of the first tokens."""
        return Donated((cache.layers[0][:length], cache.layers[1][:length]))

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model on the old memory."""
        old: Donated = state.kv_cache
        new = Donated((list(old.layers[0]), list(old.layers[1])))
        old.layers[0].reverse()
        old.layers[1].reverse()
        out = forward(new, tokens)
        state.kv_cache = new
        return out


@caught_by("engine_runs")
class Typo(Minimal):
    """A name is misspelt."""

    def sample(self, session: Session, state: State, out: int) -> int:
        """Choose a token."""
        return int(cast("Any", self).smaple(out))
