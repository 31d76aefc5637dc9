"""An engine for many sessions of one Llama, on the CPU: to read, to run and to copy.

The model is in `llama_model.py`. Any other would do: it has weights, a KV cache that can be
truncated, and `forward`, which feeds tokens to caches. All the code for sessions is here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from inference_session import Session
from inference_session.engine import BorrowedState, DecodeResult, PrefillResult, StateSlots
from inference_session.exceptions import SessionClosedError
from llama_model import Floats, KVCache, KVMemory, Llama, Tokens


Sampler = Callable[[Floats, int], int]
"""Chooses a token, given the logits of all and its position."""


def greedy(logits: Floats, position: int) -> int:
    """Choose the likeliest token."""
    return int(logits.argmax())


def sampling(*, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0) -> Sampler:
    """Return a sampler that draws among the likeliest tokens, up to a probability of `top_p`.

    It has no state for sessions to share: a draw depends on the logits, the seed and the position,
    so a failed step draws the same token when tried again.
    """
    if temperature <= 0 or not 0 < top_p <= 1 or seed < 0:
        msg = "sampling needs temperature > 0, 0 < top_p <= 1 and seed >= 0"
        raise ValueError(msg)

    return partial(_draw, temperature=temperature, top_p=top_p, seed=seed)


def _draw(logits: Floats, position: int, *, temperature: float, top_p: float, seed: int) -> int:
    likeliest = np.argsort(-logits)
    scaled = logits[likeliest].astype(np.float64)
    with np.errstate(over="ignore"):  # A tiny temperature gives minus infinity: never drawn.
        mass = np.cumsum(np.exp((scaled - scaled[0]) / temperature))
    nucleus = mass[: np.searchsorted(mass, top_p * mass[-1]) + 1]
    draw = np.random.default_rng((seed, position)).random() * nucleus[-1]
    return int(likeliest[np.searchsorted(nucleus, draw, side="right")])


@dataclass(frozen=True, slots=True)
class Step:
    """The result of a step of `LlamaEngine.answer`."""

    fed: int
    """How many tokens went through the model."""
    token: int | None = None
    """The next token of the answer; None as long as the prompt is being fed."""


class LlamaEngine:
    """An `inference_session.engine.Engine`: any number of sessions, stepped alone or together.

    Between calls the last token of a session is pending: it has not been fed to the model yet, and
    the next token is computed from it. Every call feeds all pending tokens, so the reason does not
    matter: tokens just added, an evicted cache, a rewind, a failed step. If none is pending,
    `decode` feeds the last token again.

    Every call is atomic, and every call borrows: it can raise `SessionBusyError` and the other
    errors of `StateSlots.borrow`.
    """

    def __init__(self, model: Llama, *, memory_limit: int | None = None, chunk: int = 256) -> None:
        """Serve `model`; `chunk` is the most tokens of a session fed at once."""
        if chunk < 1:
            msg = "a chunk has one token at least"
            raise ValueError(msg)
        self.model = model
        self.chunk = chunk
        self.memory = KVMemory(model.config, limit=memory_limit)
        self.slots = StateSlots(
            create=self.memory.create,
            length=lambda cache: cache.length,
            truncate=KVCache.truncate,
            share=self.memory.share,
            dump=KVCache.dump,
            load=self.memory.load,
            release=self.memory.release,
            nbytes=lambda cache: cache.nbytes,
        )

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Add tokens and fill the cache with all but the last.

        Raises `ValueError`, and changes nothing, if a token is not in the vocabulary or the context
        is too short.
        """
        new = self._check(tokens)
        with self.slots.borrow(session) as state:
            self._check_room(len(state.token_history) + len(new))
            state.append(new)
            self._feed_all_but_last(state)
        return PrefillResult(tokens_processed=len(new))

    def prompt(self, session: Session, tokens: Sequence[int], /) -> int:
        """Make `tokens` the whole history, and feed only those not yet in the KV cache.

        For chat turns: a client sends its whole conversation each time, and most of it is known.
        Returns the number of reused tokens. Raises the same errors as `prefill`.
        """
        history = self._check(tokens)
        self._check_room(len(history))
        with self.slots.borrow(session) as state:
            reused = state.reuse_prefix(history)
            self._feed_all_but_last(state)
        return reused

    def decode(self, session: Session, /, *, sample: Sampler = greedy) -> DecodeResult:
        """Add the next token; `ValueError` if the session is empty or its context full."""
        return self.decode_batch([session], sample=sample)[0]

    def decode_batch(
        self, sessions: Sequence[Session], /, *, sample: Sampler = greedy
    ) -> list[DecodeResult]:
        """Add the next token of each session, in one pass over the weights.

        All sessions take the step or none does. Raises the same errors as `decode`.
        """
        with self.slots.borrow_all(sessions) as states:
            for state in states:
                self._check_next(state.token_history)
            for state in states:
                self._feed_all_but_last(state)
            tokens = self._feed_last(states, sample) if states else []
        return [DecodeResult(token=token) for token in tokens]

    def stream(
        self,
        session: Session,
        max_tokens: int,
        *,
        sample: Sampler = greedy,
        stop: Collection[int] = (),
    ) -> Generator[int, None, None]:
        """Decode up to `max_tokens` tokens, one at a time, up to and including one of `stop`.

        Each token has a borrow of its own, over before the token is yielded. So every yielded token
        is in the history, even if the consumer goes away; and while the consumer takes its time,
        the session can be closed, evicted or inspected.
        """
        for _ in range(max_tokens):
            token = self.decode(session, sample=sample).token
            yield token
            if token in stop:
                return

    def answer(
        self,
        session: Session,
        prompt: Callable[[Sequence[int]], Sequence[int]],
        max_tokens: int,
        *,
        sample: Sampler = greedy,
        stop: Collection[int] = (),
    ) -> Generator[Step, None, None]:
        """Do the work of `prompt` and `stream` in one borrow: nobody steps the session in between.

        `prompt` gets the present history and returns the new one. Each step is short, a chunk of
        the prompt or one token, and each token is committed before it is yielded. So closing the
        generator is a way to cancel: before the first token, this leaves the session as it was; and
        later, with the tokens yielded so far. Closing the session is another way, from any thread.
        """
        with self.slots.borrow(session) as state:
            history = self._check(prompt(state.token_history))
            self._check_next(history)
            state.reuse_prefix(history)
            for tokens in state.chunks(self.chunk):
                self._feed(state, tokens)
                yield Step(len(tokens))
            for _ in range(min(max_tokens, self.model.config.context_length - len(history))):
                if session.closed:  # Nobody waits for the rest.
                    raise SessionClosedError(session.id)
                (token,) = self._feed_last([state], sample)
                state.commit()
                yield Step(1, token)
                if token in stop:
                    return

    def _feed_all_but_last(self, state: BorrowedState[KVCache]) -> None:
        for tokens in state.chunks(self.chunk):
            self._feed(state, tokens)

    def _feed(self, state: BorrowedState[KVCache], tokens: Sequence[int]) -> None:
        self.model.forward([(state.kv_cache, _array(tokens))])
        state.advance(len(tokens))

    def _feed_last(self, states: Sequence[BorrowedState[KVCache]], sample: Sampler) -> list[int]:
        """Feed the pending token of each state, and add the next one."""
        hidden = self.model.forward([(state.kv_cache, _array(state.pending)) for state in states])
        tokens: list[int] = []
        for state, logits in zip(states, self.model.logits(hidden), strict=True):
            state.advance(1)
            tokens.append(sample(logits, len(state.token_history)))
            state.append(tokens[-1:])
        return tokens

    def _check(self, tokens: Sequence[int]) -> Tokens:
        ids = np.asarray(tokens) if len(tokens) else np.empty(0, np.int32)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            msg = "tokens must be a flat sequence of ints"
            raise ValueError(msg)
        wrong = np.flatnonzero((ids < 0) | (ids >= self.model.config.vocab_size))
        if len(wrong):  # Tokens do not belong in a log: show the position only.
            msg = (
                f"token {wrong[0]} of {len(ids)} (from 0) is not in the vocabulary of "
                f"{self.model.config.vocab_size}"
            )
            raise ValueError(msg)
        return ids.astype(np.int32)

    def _check_next(self, history: Sequence[int] | Tokens) -> None:
        if not len(history):
            msg = "nothing to decode from: the session is empty, prefill it first"
            raise ValueError(msg)
        self._check_room(len(history) + 1)

    def _check_room(self, length: int) -> None:
        if length > self.model.config.context_length:
            msg = f"{length} tokens do not fit in a context of {self.model.config.context_length}"
            raise ValueError(msg)


def _array(tokens: Sequence[int]) -> Tokens:
    return np.asarray(tokens, np.int32)
