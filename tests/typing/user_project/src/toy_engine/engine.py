"""An engine for a model that hashes what it has seen."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from inference_session import Session
from inference_session.engine import BorrowedState, DecodeResult, PrefillResult, StateSlots


VOCABULARY: Final = 97


@dataclass
class Cache:
    """A KV cache: what the model has made of each token it was fed."""

    rows: list[int] = field(default_factory=list[int])

    def truncate(self, length: int) -> "Cache":
        """Forget all but the first rows."""
        del self.rows[length:]
        return self

    def feed(self, tokens: Sequence[int]) -> int:
        """Add a row for each token, and return the model's next token."""
        for token in tokens:
            last = self.rows[-1] if self.rows else 17
            self.rows.append((last * 31 + token + 1) % 1_000_003)
        return self.rows[-1] % VOCABULARY


class ToyEngine:
    """An engine: the type of its KV cache is nowhere said, but known everywhere."""

    def __init__(self) -> None:
        self.slots = StateSlots(
            create=Cache,
            length=lambda cache: len(cache.rows),
            truncate=Cache.truncate,
            nbytes=lambda cache: 8 * len(cache.rows),
        )

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Add tokens, and feed all but the last."""
        if any(not 0 <= token < VOCABULARY for token in tokens):
            raise ValueError("a token isn't in the vocabulary")
        with self.slots.borrow(session) as state:
            state.append(tokens)
            self._feed_all_but_last(state)
        return PrefillResult(tokens_processed=len(tokens))

    def decode(self, session: Session, /) -> DecodeResult:
        """Feed what is pending, and add the next token."""
        with self.slots.borrow(session) as state:
            if not state.token_history:
                raise ValueError("there's nothing to decode from: prefill the session first")
            token = self._feed_all(state)
            state.append([token])
        return DecodeResult(token=token)

    def decode_together(self, sessions: Sequence[Session]) -> list[int]:
        """Feed what is pending in each session, and add a token to each: all of it or nothing."""
        tokens: list[int] = []
        with self.slots.borrow_all(sessions) as states:
            for state in states:
                tokens.append(self._feed_all(state))
                state.append(tokens[-1:])
        return tokens

    def _feed_all_but_last(self, state: BorrowedState[Cache]) -> None:
        for tokens in state.chunks(64):
            self._feed(state, tokens)

    def _feed_all(self, state: BorrowedState[Cache]) -> int:
        self._feed_all_but_last(state)
        return self._feed(state, state.pending)

    def _feed(self, state: BorrowedState[Cache], tokens: Sequence[int]) -> int:
        token = state.kv_cache.feed(tokens)
        state.advance(len(tokens))
        return token
