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
            self._feed(state, len(state.pending) - 1)
        return PrefillResult(tokens_processed=len(tokens))

    def decode(self, session: Session, /) -> DecodeResult:
        """Feed what is pending, and add the next token."""
        with self.slots.borrow(session) as state:
            if not state.token_history:
                raise ValueError("there's nothing to decode from: prefill the session first")
            token = self._feed(state, len(state.pending))
            state.append([token])
        return DecodeResult(token=token)

    def decode_together(self, sessions: Sequence[Session]) -> list[int]:
        """Feed what is pending in each session, and add a token to each: all of it or nothing."""
        tokens: list[int] = []
        with self.slots.borrow_all(sessions) as states:
            for state in states:
                tokens.append(self._feed(state, len(state.pending)))
                state.append(tokens[-1:])
        return tokens

    def _feed(self, state: BorrowedState[Cache], count: int) -> int:
        if count <= 0:
            return 0
        token = state.kv_cache.feed(state.pending[:count])
        state.advance(count)
        return token
