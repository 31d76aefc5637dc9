"""The narrow waist between applications and engines."""

from collections.abc import Sequence
from typing import Protocol

from attrs import field, frozen

from inference_session._session import Session


@frozen
class PrefillResult:
    """The result of `Engine.prefill`.

    Args:
        tokens_processed: how many tokens were added to the session.
    """

    __module__ = "inference_session.engine"

    tokens_processed: int


@frozen
class DecodeResult:
    """The result of `Engine.decode`. Its `repr` doesn't show the token.

    Args:
        token: the id of the next token, now the last one of the session's history.
    """

    __module__ = "inference_session.engine"

    token: int = field(repr=False)


class Engine(Protocol):
    """An engine, as applications see it. Both calls are atomic: they do all they promise, or nothing."""

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Add tokens to the session's history and compute the KV cache for them.

        Raises:
            ValueError: if a token isn't in the model's vocabulary.
            SessionError: if the session can't be borrowed.
        """
        ...

    def decode(self, session: Session, /) -> DecodeResult:
        """Compute the next token and add it to the session's history.

        Raises:
            ValueError: if the session has no tokens to go on from.
            SessionError: if the session can't be borrowed.
        """
        ...


class BatchEngine(Engine, Protocol):
    """An engine that also steps many sessions at once."""

    def decode_batch(self, sessions: Sequence[Session], /) -> Sequence[DecodeResult]:
        """Compute the next token of each session and add it to its history; return the results in the same order.

        All sessions take the step, or none does.

        Raises:
            ValueError: if a session has no tokens to go on from.
            SessionError: if a session can't be borrowed, or is in the batch twice.
        """
        ...


# In the class bodies, it would be a member of the protocols.
Engine.__module__ = BatchEngine.__module__ = "inference_session.engine"
