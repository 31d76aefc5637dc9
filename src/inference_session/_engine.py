"""The narrow waist between applications and engines."""

from collections.abc import Sequence
from typing import Protocol

from attrs import field, frozen

from inference_session._session import Session


@frozen
class PrefillResult:
    """What `Engine.prefill` returns.

    Args:
        tokens_processed: how many tokens were added to the session.
    """

    __module__ = "inference_session.engine"

    tokens_processed: int


@frozen
class DecodeResult:
    """What `Engine.decode` returns. Its `repr` doesn't show the token.

    Args:
        token: the id of the next token, which the session's history now ends with.
    """

    __module__ = "inference_session.engine"

    token: int = field(repr=False)


class Engine(Protocol):
    """What an application asks of an engine. Both calls are atomic: they do all they say, or nothing."""

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


Engine.__module__ = (
    "inference_session.engine"  # not in the class, where it would be a member of the protocol
)
