"""Token ids: checked on the way in, compared at the speed of memory, never shown."""

from array import array
from collections.abc import Iterable
from itertools import takewhile
from operator import index
from sys import byteorder
from typing import TYPE_CHECKING, Final, TypeAlias, cast


if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


Tokens: TypeAlias = "array[int] | memoryview[int]"
"""Token ids as C ints, four bytes a token, not yet known to be no less than 0."""

_SIZE: Final = array("i").itemsize
_HIGHEST_BYTE: Final = _SIZE - 1 if byteorder == "little" else 0
_LONGEST_SLICE: Final = 8192  # 32 KiB: fits the caches, and the allocator keeps the memory


def as_tokens(tokens: Iterable[int]) -> Tokens:
    """Return the tokens as C ints: themselves if that's what they are, else converted.

    Raises:
        TypeError: if `tokens` can't be iterated over.
        ValueError: if one of them isn't an int, or is out of a C int's range.
    """
    if isinstance(tokens, array) and tokens.typecode == "i":
        return tokens
    ids = tokens if isinstance(tokens, (list, tuple)) else _c_ints_or_list(tokens)
    if isinstance(ids, memoryview):
        return ids
    try:
        return array("i", ids)
    except (TypeError, OverflowError):
        raise bad_token(ids) from None


def checked_copy(tokens: Tokens, start: int = 0) -> "array[int]":
    """Return a copy of the tokens from `start` on; ValueError if one of them is negative."""
    memory = tokens[start:].tobytes()
    # A C int is negative if its highest bit is set; to look at it without making ints is 30 times as fast.
    if not memory[_HIGHEST_BYTE::_SIZE].isascii():
        raise bad_token(tokens)
    return array("i", memory)


def bad_token(tokens: Iterable[int]) -> ValueError:
    """Return the error for tokens of which one is no token id; it says which, not what it is."""
    position = sum(1 for _ in takewhile(_is_token, tokens))
    return ValueError(
        f"token ids must be ints from 0 to 2**31 - 1, but the one at position {position} is not"
    )


def common_prefix_length(history: "array[int]", tokens: Tokens) -> int:
    """Return how many tokens both have in common from the start on.

    Slices are compared, as memory: ever longer ones up to the first that differs, then halves of that one.
    """
    same, end, step = 0, min(len(history), len(tokens)), 16
    while True:
        stop = min(same + step, end)
        if history[same:stop].tobytes() != tokens[same:stop].tobytes():
            break
        if stop == end:
            return end
        same, step = stop, min(2 * step, _LONGEST_SLICE)
    while stop - same > 1:
        middle = (same + stop) // 2
        if history[same:middle].tobytes() == tokens[same:middle].tobytes():
            same = middle
        else:
            stop = middle
    return same


def _c_ints_or_list(tokens: Iterable[int]) -> "memoryview[int] | list[int]":
    try:
        view = memoryview(cast("ReadableBuffer", tokens))
    except TypeError:  # not a buffer: an iterator, a tensor of PyTorch, ...
        pass
    else:
        if view.format == "i" and view.ndim == 1 and view.c_contiguous:
            return view
    tolist = getattr(tokens, "tolist", None)  # where there is one, it's much faster than iterating
    ids = tokens if tolist is None else tolist()
    try:
        iterator = iter(cast("Iterable[int]", ids))
    except TypeError:
        raise TypeError(
            f"tokens must be a sequence of ints, got {type(tokens).__name__!r}"
        ) from None
    return list(iterator)


def _is_token(token: int) -> bool:
    try:
        return 0 <= index(token) < 2**31
    except TypeError:
        return False
