"""The narrow waist between applications and engines."""

from collections.abc import Sequence
from typing import Protocol

from attrs import field, frozen

from inference_session._session import Session


@frozen
class PrefillResult:
    """What `Engine.prefill` returns."""

    tokens_processed: int
    """How many tokens were added to the session."""


@frozen
class DecodeResult:
    """What `Engine.decode` returns. Its `repr` doesn't show the token."""

    token: int = field(repr=False)
    """The id of the next token, which the session's history now ends with."""


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
