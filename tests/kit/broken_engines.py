"""A catalogue of broken engines: each does one thing wrong that real systems did, and names the checks that catch it.

All are changes of one right engine. Where a report is cited, it's of the same kind of mistake, not of the same code.
"""

from __future__ import annotations

import threading
import time
from asyncio import CancelledError
from collections.abc import Sequence
from random import Random
from typing import Any, cast
from uuid import UUID

from attrs import define
from tests.kit.catalogue import caught_by
from tests.kit.right_engines import (
    VOCAB_SIZE,
    Cache,
    Functional,
    Handles,
    TinyEngine,
    WithoutRelease,
    forward,
    mix,
)

from inference_session import Session
from inference_session.engine import BorrowedState, DecodeResult, PrefillResult, StateSlots
from inference_session.exceptions import SessionError


State = BorrowedState[Any]

# The KV cache is not the session's own


@caught_by("sessions_interleaved", "close_releases_once")
class OneCacheForAll(TinyEngine):
    """One KV cache, shared by all sessions (stanfordnlp/dspy#9640, turboderp-org/exllamav2#690)."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache()

    def create(self) -> Cache:
        """Return the only one."""
        return self.cache


@caught_by("sessions_interleaved")
class OneCacheForAllCleared(TinyEngine):
    """One KV cache, cleared for whoever begins (abetlen/llama-cpp-python#471)."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache()

    def create(self) -> Cache:
        """Return the only one, empty."""
        self.cache.cut(0)
        return self.cache


@caught_by("tokens_reach_the_session")
class SessionIgnored(TinyEngine):
    """The engine has one conversation of its own, whatever session it's given."""

    def __init__(self) -> None:
        super().__init__()
        self.own = Session()

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Prefill the own session."""
        return super().prefill(self.own, tokens)

    def decode(self, session: Session, /) -> DecodeResult:
        """Decode the own session."""
        return super().decode(self.own)

    def __del__(self) -> None:
        self.own.close()


@caught_by("tokens_reach_the_session", "id_used_again_after_close")
class SessionsById(SessionIgnored):
    """The state is kept by id in the engine, and never dropped (vllm-project/vllm#10583, InternLM/lmdeploy#4773)."""

    def __init__(self) -> None:
        super().__init__()
        self.sessions: dict[UUID, Session] = {}

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Prefill what the id stands for."""
        return TinyEngine.prefill(self, self.sessions.setdefault(session.id, Session()), tokens)

    def decode(self, session: Session, /) -> DecodeResult:
        """Decode what the id stands for."""
        return TinyEngine.decode(self, self.sessions.setdefault(session.id, Session()))

    def __del__(self) -> None:
        super().__del__()
        for session in self.sessions.values():
            session.close()


@caught_by("id_used_again_after_close", "closed_sessions_leave_nothing")
class LogitsById(TinyEngine):
    """What a step computed is kept by the session's id, and found by the next session with that id."""

    def __init__(self) -> None:
        super().__init__()
        self.bias: dict[UUID, int] = {}

    def sample(self, session: Session, state: State, out: int) -> int:
        """Choose by what is computed, and the first that ever was."""
        first = self.bias.setdefault(session.id, state.token_history[0])
        return mix(out, first) % VOCAB_SIZE


@caught_by("sessions_interleaved")
class SessionsByShortId(TinyEngine):
    """The state is kept by a part of the id, which others have, too (vllm-project/vllm#15041)."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, int] = {}

    def sample(self, session: Session, state: State, out: int) -> int:
        """Choose by what is computed, and where the session began."""
        key = session.id.hex[12]  # the version
        if len(state.token_history) < 3:
            self.first[key] = state.token_history[0]
        return mix(out, self.first.get(key, 0)) % VOCAB_SIZE


@caught_by("sessions_interleaved")
class LastSessionCached(TinyEngine):
    """The KV cache of the last session stays in the engine, and is used for the next (ggml-org/llama.cpp#27148)."""

    def __init__(self) -> None:
        super().__init__()
        self.latest = Cache()

    def create(self) -> Cache:
        """Note which cache is made."""
        self.latest = Cache()
        return self.latest

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model on the own cache, then on the one that's there."""
        cache = cast("Cache", state.kv_cache)
        if len(cache.layers[0]) != len(self.latest.layers[0]):
            return forward(cache, tokens)
        out = forward(self.latest, tokens)
        if cache is not self.latest:
            forward(cache, tokens)
        return out


@caught_by("sessions_interleaved")
class StoredPrefixAliased(WithoutRelease):
    """A stored prompt is given out itself instead of a copy, and grows with each use (MemTensor/MemOS#2301)."""

    def __init__(self) -> None:
        super().__init__()
        self.stored: tuple[list[int], list[int]] = ([], [])

    def create(self) -> Cache:
        """Return a cache that begins with what's stored: nothing yet."""
        return Cache((self.stored[0], []))

    def length(self, cache: Cache) -> int:
        """Return what one of the layers covers."""
        return len(cache.layers[1])


@caught_by("sessions_interleaved", "prefill_in_pieces")
class PrefixFoundByHash(TinyEngine):
    """What was computed for a prefix is found by too little of it (vllm-project/vllm#49377, #49449)."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[tuple[int, int], int] = {}

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model, but look up the result."""
        out = super().forward(session, state, tokens)
        key = (state.kv_cache.length, tokens[-1] % 8)
        return self.known.setdefault(key, out)


# Positions and samplers


@caught_by("sessions_interleaved", "replay_gives_the_same_tokens")
class PositionsInEngine(TinyEngine):
    """Positions are counted in the engine instead of being taken from the session."""

    def __init__(self) -> None:
        super().__init__()
        self.position = 0

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model where the last step ended."""
        start, self.position = self.position, self.position + len(tokens)
        return forward(state.kv_cache, tokens, start)


@caught_by("failure_before_advance", "rewind", "decode_from_the_cache")
class PositionsById(TinyEngine):
    """Positions are counted for each session, but beside it: what is taken back isn't taken back there."""

    def __init__(self) -> None:
        super().__init__()
        self.positions: dict[UUID, int] = {}

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model where the session's last step ended."""
        if not state.kv_length and len(state.token_history) == len(state.pending):
            self.positions.setdefault(session.id, 0)
        start = self.positions[session.id]
        self.positions[session.id] += len(tokens)
        return forward(state.kv_cache, tokens, start)


@caught_by("prefill_in_pieces", "decode_from_the_cache")
class PositionsRestart(TinyEngine):
    """Each chunk begins at position 0."""

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model from the start."""
        return forward(state.kv_cache, tokens, 0)


@caught_by("prefill_in_pieces", "decode_from_the_cache")
class ChunkSeesItselfOnly(TinyEngine):
    """The mask is made for the chunk, so that its tokens don't see what was before."""

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model on the chunk, if it is more than a token."""
        if len(tokens) == 1:
            return super().forward(session, state, tokens)
        chunk = Cache()
        out = forward(chunk, tokens)
        for layer, new in zip(state.kv_cache.layers, chunk.layers, strict=True):
            layer.extend(new)
        return out


@caught_by("replay_gives_the_same_tokens", "sessions_interleaved")
class OneSamplerForAll(TinyEngine):
    """A seeded sampler is shared by all sessions."""

    def __init__(self) -> None:
        super().__init__()
        self.random = Random(0)

    def sample(self, session: Session, state: State, out: int) -> int:
        """Draw a token."""
        return (out + self.random.randrange(3)) % VOCAB_SIZE


@caught_by("replay_gives_the_same_tokens", "tokens_reach_the_session")
class SamplerWithoutSeed(TinyEngine):
    """Each draw is another, so that nothing can be replayed."""

    def sample(self, session: Session, state: State, out: int) -> int:
        """Draw a token."""
        return (out + Random().randrange(3)) % VOCAB_SIZE


@caught_by("failure_at_append", "rewind")
class SamplerNotTakenBack(TinyEngine):
    """A session's sampler lives in the engine: a step that fails has drawn all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: dict[UUID, int] = {}

    def sample(self, session: Session, state: State, out: int) -> int:
        """Draw a token, by how often that was done."""
        draw = self.draws[session.id] = self.draws.get(session.id, 0) + 1
        return mix(out, draw) % VOCAB_SIZE


# Truncation


@caught_by("rewind", "reuse_prefix")
class TruncatesTooLittle(TinyEngine):
    """Truncation is off by one."""

    def truncate(self, cache: Cache, length: int) -> Cache:
        """Keep one too many."""
        cache.cut(length + 1)
        return cache


@caught_by("rewind", "reuse_prefix")
class TruncatesTooMuch(TinyEngine):
    """Truncation is off by one, the other way, and the length says what was asked for."""

    def truncate(self, cache: Cache, length: int) -> Cache:
        """Forget the last token that should be kept, but for its place."""
        cache.cut(max(length - 1, 0))
        for layer in cache.layers:
            layer.extend([0] * (length - len(layer)))
        return cache


@caught_by("rewind", "reuse_prefix", "failure_before_advance")
class TruncatesFirstLayer(TinyEngine):
    """Truncation and length know of the first layer only, as `get_seq_length` of transformers does."""

    def length(self, cache: Cache) -> int:
        """Return what the first layer covers."""
        return len(cache.layers[0])

    def truncate(self, cache: Cache, length: int) -> Cache:
        """Cut the first layer."""
        del cache.layers[0][length:]
        return cache


@caught_by("rewind", "reuse_prefix")
class TruncatesNothingAtZero(TinyEngine):
    """Truncation to nothing does nothing (microsoft/onnxruntime-genai#2140)."""

    def truncate(self, cache: Cache, length: int) -> Cache:
        """Cut, if there's something to keep."""
        if length:
            cache.cut(length)
        return cache


@caught_by("rewind", "reuse_prefix")
class TruncatesNothing(TinyEngine):
    """Truncation is a silent no-op (abetlen/llama-cpp-python PR 2108, for hybrid models)."""

    def truncate(self, cache: Cache, length: int) -> Cache:
        """Return it as it is."""
        return cache


@define(eq=False)
class Offset(Cache):
    """A cache that says how long it is."""

    offset: int = 0


@caught_by("rewind", "reuse_prefix")
class TruncatesTheOffset(TinyEngine):
    """Truncation moves an offset, and new tokens come after the old ones all the same (ml-explore/mlx-lm#1494)."""

    def create(self) -> Offset:
        """Return a cache with an offset."""
        return Offset()

    def length(self, cache: Offset) -> int:
        """Return the offset."""
        return cache.offset

    def truncate(self, cache: Offset, length: int) -> Offset:
        """Move the offset."""
        cache.offset = length
        return cache

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model, and move the offset."""
        state.kv_cache.offset += len(tokens)
        return super().forward(session, state, tokens)


@caught_by("rewind", "reuse_prefix")
class KeepsTheLast(TinyEngine):
    """Truncation keeps the last tokens instead of the first, as a sliding window does."""

    def truncate(self, cache: Cache, length: int) -> Cache:
        """Forget the first tokens."""
        for layer in cache.layers:
            del layer[: len(layer) - length]
        return cache


@caught_by("rewind", "reuse_prefix")
class TruncatedCacheAliased(TinyEngine):
    """Truncation returns a cache that is made of the same layers, which are as long as before."""

    def create(self) -> Offset:
        """Return a cache with an offset."""
        return Offset()

    def length(self, cache: Offset) -> int:
        """Return the offset."""
        return cache.offset

    def truncate(self, cache: Offset, length: int) -> Offset:
        """Return another cache of the same layers."""
        return Offset(cache.layers, length)

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model, and move the offset."""
        state.kv_cache.offset += len(tokens)
        return super().forward(session, state, tokens)


@caught_by("rewind", "reuse_prefix")
class LogitsKeptAfterRewind(TinyEngine):
    """What the last step computed is kept with the cache, and used after a rewind (vllm-project/vllm#49377)."""

    def create(self) -> Offset:
        """Return a cache that keeps the last result in its offset."""
        return Offset(offset=-1)

    def feed_all_but_last(self, session: Session, state: State) -> None:
        """Feed, and forget the result if that was new tokens."""
        if len(state.pending) > 1:
            state.kv_cache.offset = -1
        super().feed_all_but_last(session, state)

    def sample(self, session: Session, state: State, out: int) -> int:
        """Choose by the result that was kept, if there is one."""
        cache = state.kv_cache
        kept = out if cache.offset < 0 else cache.offset
        cache.offset = -1 if len(state.token_history) % 2 else out
        return kept % VOCAB_SIZE


@caught_by("failure_after_advance")
class LogitsKeptAfterFailure(WithoutRelease):
    """What came out for the last token is kept with the cache, also when the step that fed it is taken back."""

    def create(self) -> Offset:
        """Return a cache that keeps the last result in its offset."""
        return Offset(offset=-1)

    def feed_all_but_last(self, session: Session, state: State) -> None:
        """Feed all, and keep what came out."""
        if state.pending:
            state.kv_cache.offset = self.feed(session, state, state.pending)

    def decode_borrowed(self, session: Session, state: State) -> DecodeResult:
        """Add the token that was kept, and feed it."""
        if not state.token_history:
            raise ValueError("nothing to decode from")
        self.feed_all_but_last(session, state)
        token = state.kv_cache.offset % VOCAB_SIZE
        state.append([token])
        self.feed_all_but_last(session, state)
        return DecodeResult(token)


# Tokens


@caught_by("bad_tokens_are_refused")
class AppendsBeforeValidating(TinyEngine):
    """Prefill appends its tokens before it looks at them, in a borrow of its own (ml-explore/mlx-lm PR 405)."""

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Append, validate, feed."""
        with self.slots.borrow(session) as state:
            state.append(tokens)
        self.validate(tokens)
        with self.slots.borrow(session) as state:
            self.feed_all_but_last(session, state)
        return PrefillResult(len(tokens))


@caught_by("failure_before_the_model_ran", "failure_before_advance", "failure_between_chunks")
class PromptDoubledOnRetry(TinyEngine):
    """The tokens of a prefill that failed stay, so that they are there twice when it's tried again."""

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Append; then feed."""
        self.validate(tokens)
        with self.slots.borrow(session) as state:
            state.append(tokens)
        with self.slots.borrow(session) as state:
            self.feed_all_but_last(session, state)
        return PrefillResult(len(tokens))


@caught_by("failure_between_chunks")
class CommitsChunks(TinyEngine):
    """Each chunk is committed, and with the first all tokens: a prefill that fails has happened."""

    def feed(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Feed a chunk, and save what there is."""
        out = super().feed(session, state, tokens)
        if len(state.pending) > 1:
            state.commit()
        return out


@caught_by("engine_runs")
class FeedsPendingTwice(TinyEngine):
    """Prefill feeds all of its tokens, and decode the last of them again."""

    def feed_all_but_last(self, session: Session, state: State) -> None:
        """Feed all."""
        tokens = state.pending
        if tokens:
            self.forward(session, state, tokens)
            state.advance(len(tokens) - 1)


@caught_by("decode_from_the_cache", "prefill_in_pieces")
class FeedsPendingTwiceUnnoticed(TinyEngine):
    """The last token of a chunk is fed again with the next one; the length is the engine's own count."""

    def create(self) -> Offset:
        """Return a cache that counts."""
        return Offset()

    def length(self, cache: Offset) -> int:
        """Return the count."""
        return cache.offset

    def truncate(self, cache: Offset, length: int) -> Offset:
        """Cut what is kept, and count."""
        cache.cut(length)
        cache.offset = length
        return cache

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Feed the last token again, before these."""
        last = list(state.token_history[: state.kv_length][-1:]) if len(tokens) > 1 else []
        state.kv_cache.offset += len(tokens)
        return super().forward(session, state, [*last, *tokens])


@caught_by("tokens_reach_the_session")
class DropsTheRest(TinyEngine):
    """Prefill takes whole chunks only, and what is left over is lost."""

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Prefill whole chunks."""
        whole = len(tokens) - len(tokens) % self.chunk or len(tokens)
        super().prefill(session, tokens[:whole])
        return PrefillResult(len(tokens))


@caught_by("tokens_reach_the_session")
class CountsAllTokens(TinyEngine):
    """Prefill returns how many tokens there are, not how many it added."""

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Prefill, and count."""
        super().prefill(session, tokens)
        return PrefillResult(session.token_count)


@caught_by("tokens_reach_the_session")
class DecodeKeepsItsToken(TinyEngine):
    """Decode returns a token that it doesn't add."""

    def decode_borrowed(self, session: Session, state: State) -> DecodeResult:
        """Decode, and take it back."""
        result = super().decode_borrowed(session, state)
        state.rewind(len(state.token_history) - 1)
        return result


@caught_by("tokens_reach_the_session")
class DecodeReturnsTheLast(TinyEngine):
    """Decode returns the token that it fed instead of the one that it added."""

    def decode_borrowed(self, session: Session, state: State) -> DecodeResult:
        """Decode, and return what was there before."""
        super().decode_borrowed(session, state)
        return DecodeResult(state.token_history[-2])


@caught_by("engine_runs")
class EatsThePrompt(TinyEngine):
    """Prefill takes the tokens out of the caller's list."""

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Prefill, and empty the list."""
        result = super().prefill(session, tokens)
        if isinstance(tokens, list):
            tokens.clear()
        return result


@caught_by("bad_tokens_are_refused")
class TokensWrap(TinyEngine):
    """A negative token counts from the end of the vocabulary, as an index of an array does."""

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Prefill what the tokens are taken for."""
        if min(tokens) >= -VOCAB_SIZE:
            tokens = [token % VOCAB_SIZE if token < 0 else token for token in tokens]
        return super().prefill(session, tokens)


@caught_by("bad_tokens_are_refused")
class OneTokenTooMany(TinyEngine):
    """The vocabulary is thought to have one more token."""

    def validate(self, tokens: Sequence[int]) -> None:
        """Refuse what is more than one too high."""
        super().validate([0 if token == VOCAB_SIZE else token for token in tokens])


@caught_by("bad_tokens_are_refused")
class ValidatesTheFirst(TinyEngine):
    """Only the first token is looked at."""

    def validate(self, tokens: Sequence[int]) -> None:
        """Refuse if the first isn't in the vocabulary."""
        super().validate(tokens[:1])


@caught_by("bad_tokens_are_refused")
class BadTokenIsAnIndexError(TinyEngine):
    """A token that isn't in the vocabulary ends in some error of the embedding."""

    def validate(self, tokens: Sequence[int]) -> None:
        """Look them up."""
        for token in tokens:
            [0][token // VOCAB_SIZE]


@caught_by("empty_session_is_refused")
class EmptySessionBegins(TinyEngine):
    """Decoding an empty session begins a text, which nobody asked for."""

    def decode_borrowed(self, session: Session, state: State) -> DecodeResult:
        """Decode, from a first token if there's none."""
        if not state.token_history:
            state.append([0])
        return super().decode_borrowed(session, state)


@caught_by("empty_session_is_refused")
class EmptySessionIsAnIndexError(TinyEngine):
    """Decoding an empty session ends in some error."""

    def decode_borrowed(self, session: Session, state: State) -> DecodeResult:
        """Look at the last token, which there must be."""
        assert state.token_history[-1] >= 0
        return super().decode_borrowed(session, state)


@caught_by("engine_runs")
class FunctionalForgets(Functional):
    """A step returns a new cache, which prefill doesn't put into the session."""

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model on a copy, and forget it."""
        return forward(self.truncate(state.kv_cache, state.kv_length), tokens)


# Steps that fail


@caught_by("failure_before_advance", "failure_after_advance", "failure_at_append")
class SwallowsErrors(TinyEngine):
    """An error becomes an answer (sgl-project/sglang#31765)."""

    def decode(self, session: Session, /) -> DecodeResult:
        """Decode something."""
        try:
            return super().decode(session)
        except (RuntimeError, MemoryError):
            return DecodeResult(0)
        except Exception as error:
            if isinstance(error, SessionError | ValueError):
                raise
            return DecodeResult(0)


@caught_by("failure_before_the_model_ran", "failure_at_append")
class SwallowsInterrupts(TinyEngine):
    """Ctrl-C and cancellation are put aside, and the step is tried again."""

    def decode(self, session: Session, /) -> DecodeResult:
        """Decode, whatever happens."""
        try:
            return super().decode(session)
        except (KeyboardInterrupt, CancelledError):
            return super().decode(session)


@caught_by("failure_before_the_model_ran", "failure_before_advance")
class WrapsErrors(TinyEngine):
    """A lack of memory arrives as something else, so that a server can't tell it."""

    def decode(self, session: Session, /) -> DecodeResult:
        """Decode."""
        try:
            return super().decode(session)
        except MemoryError as error:
            raise RuntimeError("the step failed") from error


@caught_by("failure_before_advance", "failure_at_append")
class CancelledStepIsKept(TinyEngine):
    """A step that is cancelled ends as if it had been done (sgl-project/sglang#36475)."""

    def decode(self, session: Session, /) -> DecodeResult:
        """Decode, and keep what there is."""
        cancelled = None
        with self.slots.borrow(session) as state:
            length = len(state.token_history)
            try:
                return self.decode_borrowed(session, state)
            except CancelledError as error:
                cancelled = error
                state.rewind(length)
                state.append([0])
        raise cancelled


@caught_by(
    "failure_before_the_model_ran",
    "failure_before_advance",
    "failure_after_advance",
    "failure_between_chunks",
    "failure_at_append",
    "failure_in_truncate",
    "any_sequence_of_calls",
)
class LockNotReleased(TinyEngine):
    """A lock isn't released when a step fails, and all that follow wait for ever (abetlen/llama-cpp-python#1861)."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def feed(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Feed, one at a time."""
        self.lock.acquire()
        out = super().feed(session, state, tokens)
        self.lock.release()
        return out

    def decode_borrowed(self, session: Session, state: State) -> DecodeResult:
        """Decode, one at a time."""
        len(state.pending)
        return super().decode_borrowed(session, state)

    def sample(self, session: Session, state: State, out: int) -> int:
        """Choose, one at a time; the lock is released when all is done."""
        self.lock.acquire()
        return super().sample(session, state, out)

    def decode(self, session: Session, /) -> DecodeResult:
        """Decode, and release the lock."""
        result = super().decode(session)
        self.lock.release()
        return result


@caught_by("failure_before_advance", "failure_between_chunks")
class LockOfAThreadNotReleased(TinyEngine):
    """The same with a lock that its own thread may take again: only others wait for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.RLock()

    def feed(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Feed, one at a time."""
        self.lock.acquire()
        out = super().feed(session, state, tokens)
        self.lock.release()
        return out


@caught_by("failure_before_advance")
class FlagNotReset(TinyEngine):
    """A flag says that a step is under way; a step that fails leaves it set (InternLM/lmdeploy's in-flight flag)."""

    def __init__(self) -> None:
        super().__init__()
        self.busy = False

    def feed(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Feed, and say so."""
        if self.busy:
            raise RuntimeError("busy")
        self.busy = True
        out = super().feed(session, state, tokens)
        self.busy = False
        return out


@caught_by("failure_before_advance", "failure_at_append")
class BorrowLeftOpen(TinyEngine):
    """A borrow is entered by hand, and not ended when a step fails."""

    def decode(self, session: Session, /) -> DecodeResult:
        """Decode, with the borrow in an attribute."""
        self.borrow = self.slots.borrow(session)
        state = self.borrow.__enter__()
        try:
            result = self.decode_borrowed(session, state)
        except (ValueError, SessionError) as error:
            self.borrow.__exit__(type(error), error, None)
            raise
        self.borrow.__exit__(None, None, None)
        return result


@caught_by("failure_before_advance", "failure_after_advance")
class ThreadHasTheState(TinyEngine):
    """Something of a session is kept by the thread that made its last step; in another thread it's missing."""

    def __init__(self) -> None:
        super().__init__()
        self.local = threading.local()

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model, with a workspace of the thread."""
        if not state.kv_length:
            self.local.workspace = 1
        return super().forward(session, state, tokens) * int(self.local.workspace)


@caught_by("failure_before_advance")
class ReleasedByHandler(Handles):
    """After an error, a cache is released that the session still has (turboderp-org/exllamav3#227)."""

    def decode(self, session: Session, /) -> DecodeResult:
        """Decode, and clean up."""
        with self.slots.borrow(session) as state:
            try:
                return self.decode_borrowed(session, state)
            except MemoryError:
                release = self.slots.release
                assert release is not None
                release(state.kv_cache)
                raise


# One at a time


@caught_by("two_threads_on_one_session")
class WaitsForTheOther(TinyEngine):
    """A lock is taken before the session is borrowed: a second step of one session waits, and then goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def decode(self, session: Session, /) -> DecodeResult:
        """Decode, when it's its turn."""
        with self.lock:
            return super().decode(session)

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Prefill, when it's its turn."""
        with self.lock:
            return super().prefill(session, tokens)


@caught_by("two_threads_on_one_session")
class LooksThenActs(TinyEngine):
    """A step reads the session in one borrow and writes it in another (InternLM/lmdeploy: two tasks got inside)."""

    def decode(self, session: Session, /) -> DecodeResult:
        """Decode from what was there a moment ago."""
        with self.slots.borrow(session) as state:
            if not state.token_history:
                raise ValueError("nothing to decode from")
            history = list(state.token_history)
        out = forward(Cache(), history)
        with self.slots.borrow(session) as state:
            self.feed_all_but_last(session, state)
            token = out % VOCAB_SIZE
            state.append([token])
            return DecodeResult(token)


@caught_by("two_threads_on_one_session", "closed_session_is_refused", "foreign_session_is_refused")
class BusyIsNoError(TinyEngine):
    """A session that can't be borrowed is answered all the same (youssofal/MTPLX#94)."""

    def decode(self, session: Session, /) -> DecodeResult:
        """Decode something."""
        try:
            return super().decode(session)
        except SessionError:
            return DecodeResult(0)


@caught_by("two_threads_on_one_session")
class BusyIsARuntimeError(TinyEngine):
    """A session that is busy ends in some error, which a server can't tell."""

    def __init__(self) -> None:
        super().__init__()
        self.busy: set[Session] = set()

    def decode(self, session: Session, /) -> DecodeResult:
        """Decode, if the session isn't busy."""
        if session in self.busy:
            raise RuntimeError("busy")
        self.busy.add(session)
        try:
            return super().decode(session)
        finally:
            self.busy.discard(session)

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Prefill, if the session isn't busy."""
        if session in self.busy:
            raise RuntimeError("busy")
        self.busy.add(session)
        try:
            return super().prefill(session, tokens)
        finally:
            self.busy.discard(session)


# The end of sessions


@caught_by("tokens_reach_the_session")
class ReleasedInUse(Handles):
    """A cache is released at the end of a text, while the session still has it (sgl-project/sglang#27024)."""

    def decode_borrowed(self, session: Session, state: State) -> DecodeResult:
        """Decode, and release the cache after some tokens."""
        result = super().decode_borrowed(session, state)
        if len(state.token_history) > 6:
            release = self.slots.release
            assert release is not None
            release(state.kv_cache)
        return result


@caught_by("close_releases_once", "shared_beginnings")
class TruncateReleases(Handles):
    """Truncation releases the old cache, but returns it."""

    def truncate(self, cache: int, length: int) -> int:
        """Cut, and release."""
        super().truncate(cache, length)
        kept = self.caches[cache]
        self.release(cache)
        self.caches[cache] = kept
        return cache


@caught_by("closed_sessions_leave_nothing")
class HandleNeverReleased(Handles):
    """Handles are not given back, and there are none after a while (vllm-project/vllm#46283)."""

    def make_slots(self) -> StateSlots[Any]:
        """Describe the cache, but for how to release it."""
        return StateSlots(create=self.create, length=self.length, truncate=self.truncate)


@caught_by("closed_sessions_leave_nothing")
class HandleLostByTruncate(Handles):
    """Truncation takes a new handle and doesn't give the old one back."""

    def truncate(self, cache: int, length: int) -> int:
        """Copy to a new handle."""
        new = self.create()
        self.caches[new] = self.caches[cache]
        self.caches[new].cut(length)
        return new


@caught_by("close_releases_once", "id_used_again_after_close", "sessions_interleaved")
class HandleNotCleared(Handles):
    """What was behind a handle is still there when it's taken again; the length is the engine's own count."""

    def __init__(self) -> None:
        super().__init__()
        self.all = {handle: Cache() for handle in self.free}

    def create(self) -> int:
        """Take a handle, as it is."""
        handle = super().create()
        self.all[handle].layers = (list(self.all[handle].layers[0]), [])
        self.caches[handle] = self.all[handle]
        return handle

    def length(self, cache: int) -> int:
        """Return what one of the layers covers."""
        return len(self.caches[cache].layers[1])

    def truncate(self, cache: int, length: int) -> int:
        """Cut both layers."""
        both = self.caches[cache].layers
        surplus = len(both[1]) - length
        del both[0][len(both[0]) - surplus :], both[1][length:]
        return cache


@caught_by("dropped_session_is_released")
class KeepsSessionsAlive(TinyEngine):
    """The engine refers to each session that it served last, so that one that's dropped is never released."""

    def __init__(self) -> None:
        super().__init__()
        self.served: list[Session] = []

    def decode(self, session: Session, /) -> DecodeResult:
        """Decode, and remember the session."""
        self.served = [session]
        return super().decode(session)


@caught_by("closed_sessions_leave_nothing")
class KeepsBooks(TinyEngine):
    """Something is noted of each session, and never forgotten (turboderp-org/exllamav3#227)."""

    def __init__(self) -> None:
        super().__init__()
        self.started: dict[UUID, float] = {}

    def decode(self, session: Session, /) -> DecodeResult:
        """Decode, and note since when."""
        self.started.setdefault(session.id, time.monotonic())
        return super().decode(session)


@caught_by("closed_sessions_leave_nothing")
class KeepsCaches(WithoutRelease):
    """A KV cache is kept by the engine, too, and never freed."""

    def __init__(self) -> None:
        super().__init__()
        self.caches: list[Cache] = []

    def create(self) -> Cache:
        """Return a new cache, and keep it."""
        self.caches.append(Cache())
        return self.caches[-1]


@caught_by("close_in_mid_step")
class ClosedInMidStepCrashes(TinyEngine):
    """A session that is closed in the middle of a step ends in some error."""

    def sample(self, session: Session, state: State, out: int) -> int:
        """Choose a token, of a session that can't be closed."""
        assert not session.closed
        return super().sample(session, state, out)


@caught_by("close_in_mid_step")
class CancelledStepCancelsTheNext(TinyEngine):
    """A step that is cancelled leaves word, and another session's step obeys (ggml-org/llama.cpp#27052)."""

    def __init__(self) -> None:
        super().__init__()
        self.cancelled = False

    def sample(self, session: Session, state: State, out: int) -> int:
        """Choose a token, if nobody cancelled."""
        if self.cancelled:
            raise RuntimeError("cancelled")
        self.cancelled = session.closed
        return super().sample(session, state, out)
