"""Further slots: typed keys for the rest of a conversation's state."""

from collections.abc import Callable
from typing import Any, Final, Generic, TypeAlias, TypeVar, final

from attrs import NOTHING, Attribute, field, frozen

from inference_session._never_copied import NeverCopied


T = TypeVar("T")


def is_callable(_: object, attribute: "Attribute[Any]", function: object) -> None:
    """Validate a function that an engine gives; one with a default may also be None."""
    if not callable(function) and (function is not None or attribute.default is NOTHING):
        raise TypeError(f"{attribute.alias} must be a function, got {type(function).__name__!r}")


@final
@frozen(eq=False, repr=False, match_args=False, getstate_setstate=False)
class Slot(NeverCopied, Generic[T]):
    """A typed key for one more value in the state of each session, beside the KV cache and the tokens.

    Make one at module level, like a `contextvars.ContextVar`; then `state[slot]` is a session's value, and
    `state[slot] = value` sets it. Values are committed and rolled back with the tokens. They survive `evict` and
    `rewind`, and go when the session is closed. Changes in place are not rolled back: set a new value instead.

    Args:
        factory: returns a session's first value, on first use.
    """

    __module__ = "inference_session.engine"

    _factory: Callable[[], T] = field(repr=False, alias="factory", validator=is_callable)

    _instead = "as a copy would be another key: share this very object"


Values: TypeAlias = dict[Slot[Any], Any]

NO_VALUES: Final[Values] = {}  # shared, so never written to
