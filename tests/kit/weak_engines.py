"""Engines that nothing can be shown of: what they answer depends on too little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from tests.kit.right_engines import VOCAB_SIZE, Cache, TinyEngine, forward

from inference_session import Session
from inference_session.engine import BorrowedState


State = BorrowedState[Any]


class Constant(TinyEngine):
    """It answers everything with the same token."""

    def sample(self, session: Session, state: State, out: int) -> int:
        """Choose the one token."""
        return 7


class Echo(TinyEngine):
    """It answers with the last token, as a random model with tied embeddings does."""

    def sample(self, session: Session, state: State, out: int) -> int:
        """Choose the last token."""
        return state.token_history[-1]


class Shortsighted(TinyEngine):
    """Its answers depend on the last two tokens."""

    def sample(self, session: Session, state: State, out: int) -> int:
        """Choose by the last tokens."""
        return forward(Cache(), state.token_history[-2:]) % VOCAB_SIZE


class BagOfTokens(TinyEngine):
    """Its answers don't depend on the order of tokens."""

    def sample(self, session: Session, state: State, out: int) -> int:
        """Choose by which tokens there are."""
        return forward(Cache(), sorted(state.token_history)) % VOCAB_SIZE


class BeginningOnly(TinyEngine):
    """Its answers don't depend on the last token."""

    def sample(self, session: Session, state: State, out: int) -> int:
        """Choose by all but the last token."""
        return forward(Cache(), [*state.token_history[:-1], 0]) % VOCAB_SIZE


class Cacheless(TinyEngine):
    """It fills a KV cache, and computes everything anew from the tokens all the same."""

    def forward(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model on all tokens."""
        super().forward(session, state, tokens)
        return forward(Cache(), state.token_history)


class Stateless(TinyEngine):
    """It has no KV cache at all, and computes everything anew from the tokens."""

    def feed_all_but_last(self, session: Session, state: State) -> None:
        """Leave it all to `decode`."""

    def feed(self, session: Session, state: State, tokens: Sequence[int]) -> int:
        """Run the model on all tokens."""
        return forward(Cache(), state.token_history)


WEAK: Final[dict[type[TinyEngine], str]] = {
    Constant: "it answers every prompt with the same token",
    Echo: "the first token",
    Shortsighted: "the first token",
    BagOfTokens: "the order of the tokens",
    BeginningOnly: "the last token",
    Cacheless: "the KV cache",
    Stateless: "the KV cache",
}
"""The weak engines, and what is said of them."""
