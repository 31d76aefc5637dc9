"""Token ids: checked on the way in, compared at the speed of memory, never shown.

Errors must not show them either, and a traceback keeps the variables of every frame on its way. So a frame with tokens
in its variables deletes them before it lets an error out.
"""

from array import array
from collections.abc import Iterable
from itertools import takewhile
from operator import index
from sys import byteorder
from typing import TYPE_CHECKING, Final, TypeAlias, cast


if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    Ids: TypeAlias = array[int]
    """Token ids as C ints, four bytes a token."""
    Tokens: TypeAlias = Ids | memoryview[int]
    """The same from a caller, perhaps with negative ones."""
else:
    Ids = array  # no type parameter before 3.12
    Tokens = array | memoryview

NO_TOKENS: Final[Ids] = array("i")  # shared, so never written to

_SIZE: Final = array("i").itemsize
_HIGHEST_BYTE: Final = _SIZE - 1 if byteorder == "little" else 0
_LONGEST_SLICE: Final = 8192  # 32 KiB: fits the caches, and the allocator keeps the memory


def as_tokens(tokens: Iterable[int]) -> Tokens:
    """Return the tokens as C ints: unchanged if they are such already, else converted.

    Raises:
        TypeError: if `tokens` isn't iterable.
        ValueError: if one of them isn't an int, or is out of a C int's range; or if they are bytes or bools.
    """
    try:
        if isinstance(tokens, (list, tuple)):
            return _converted(tokens)
        if isinstance(tokens, array) and tokens.typecode == "i":
            return tokens
        view = _c_ints(tokens)
        return _converted(_listed(tokens)) if view is None else view
    finally:
        del tokens


def checked_copy(tokens: Iterable[int]) -> Ids:
    """Return a copy of the tokens; raise as `as_tokens` does, and ValueError if one of them is negative."""
    try:
        if isinstance(tokens, (list, tuple)):
            return checked(_converted(tokens))
        return checked(copy_of(as_tokens(tokens)))
    finally:
        del tokens


def copy_of(tokens: Tokens) -> Ids:
    """Return a copy, out of reach of other threads."""
    return array("i", tokens.tobytes())


def checked(ids: Ids, start: int = 0) -> Ids:
    """Return the same tokens, the first at position `start`; ValueError if one of them is negative."""
    # A C int is negative if its highest bit is set. For many, testing it without making ints is 30 times as fast.
    if ids[0] >= 0 if len(ids) == 1 else ids.tobytes()[_HIGHEST_BYTE::_SIZE].isascii():
        return ids
    position = sum(1 for _ in takewhile(_is_token, ids))
    del ids
    raise _bad_token(start + position)


def common_prefix_length(history: Ids, tokens: Tokens) -> int:
    """Return the length of the longest common prefix.

    Slices are compared, as memory: ever longer ones until one differs, then halves of that slice.
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


def _converted(tokens: list[int] | tuple[int, ...]) -> Ids:
    try:
        return array("i", tokens)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 from the `__index__` of any of them
        position = sum(1 for _ in takewhile(_is_token, tokens))
    finally:
        del tokens
    raise _bad_token(position)


def _c_ints(tokens: Iterable[int]) -> "memoryview[int] | None":
    """Return the memory of a buffer of C ints, or None."""
    try:
        view = memoryview(cast("ReadableBuffer", tokens))
    except TypeError:  # not a buffer: an iterator, a tensor of PyTorch, ...
        return None
    if view.format != "i" or view.ndim != 1 or not view.c_contiguous:
        return None
    # A masked array of NumPy has its hidden elements in memory, too.
    return None if hasattr(tokens, "mask") else view


def _listed(tokens: Iterable[int]) -> list[int]:
    """Return the ints of any other iterable as a list."""
    kind, ids, tolist = type(tokens).__name__, list[int](), None
    try:
        if isinstance(tokens.obj if isinstance(tokens, memoryview) else tokens, (bytes, bytearray)):
            raise ValueError(f"token ids must be ints, not the bytes of a {kind!r}")  # noqa: TRY004
        tolist = getattr(tokens, "tolist", None)  # faster than iterating
        try:
            iterator = iter(cast("Iterable[int]", tokens if tolist is None else tolist()))
        except TypeError:
            raise TypeError(f"tokens must be a sequence of ints, got {kind!r}") from None
        ids = list(iterator)
        kinds = [] if tolist is None else [*map(type, ids)]
        if bool in kinds:  # it's a mask
            raise _bad_token(kinds.index(bool))
        return ids
    finally:
        tokens = ids = []
        tolist = None


def _bad_token(position: int) -> ValueError:
    """Return the error for an invalid token id; it shows the position, not the value."""
    return ValueError(
        f"token ids must be ints from 0 to 2**31 - 1, but the one at position {position} is not"
    )


def _is_token(token: int) -> bool:
    try:
        return 0 <= index(token) < 2**31
    except Exception:  # noqa: BLE001 from its `__index__`
        return False
