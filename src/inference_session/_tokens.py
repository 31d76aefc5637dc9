"""Token ids: checked on the way in, compared at the speed of memory, never shown."""

from array import array
from collections.abc import Iterable, Sequence
from itertools import takewhile
from operator import index
from typing import TYPE_CHECKING, cast


if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


_LONGEST_SLICE = 8192  # 32 KiB: fits the caches, and the allocator keeps the memory


def as_token_array(tokens: Iterable[int]) -> "array[int]":
    """Return the tokens as an array of C ints, four bytes a token; it may be `tokens` itself.

    Negative ids are let through, for `refuse_negative` to find: what is compared first need not be checked twice.

    Raises:
        TypeError: if `tokens` can't be iterated over.
        ValueError: if one of them isn't an int, or is out of a C int's range.
    """
    if isinstance(tokens, (list, tuple)):
        ids: Sequence[int] = tokens
    elif isinstance(tokens, array) and tokens.typecode == "i":
        return tokens
    else:
        ids = _copied(tokens)
    try:
        return array("i", ids)
    except (TypeError, OverflowError):
        raise bad_token(ids) from None


def refuse_negative(tokens: Sequence[int]) -> None:
    """Raise ValueError if a token id is negative."""
    if min(tokens, default=0) < 0:
        raise bad_token(tokens)


def bad_token(tokens: Sequence[int]) -> ValueError:
    """Return the error for tokens of which one is no token id; it says which, not what it is."""
    position = sum(1 for _ in takewhile(_is_token, tokens))
    return ValueError(
        f"token ids must be ints from 0 to 2**31 - 1, but the one at position {position} is not"
    )


def common_prefix_length(left: "array[int]", right: "array[int]") -> int:
    """Return how many tokens `left` and `right` have in common from the start on.

    Slices are compared, at C speed: ever longer ones up to the first that differs, then halves of that one.
    """
    same, end, step = 0, min(len(left), len(right)), 16
    while True:
        stop = min(same + step, end)
        if left[same:stop] != right[same:stop]:
            break
        if stop == end:
            return end
        same, step = stop, min(2 * step, _LONGEST_SLICE)
    while stop - same > 1:
        middle = (same + stop) // 2
        if left[same:middle] == right[same:middle]:
            same = middle
        else:
            stop = middle
    return same


def _copied(tokens: Iterable[int]) -> Sequence[int]:
    """Copy the ids out of any other container: at once from a buffer of C ints, else one by one."""
    try:
        view = memoryview(cast("ReadableBuffer", tokens))
    except TypeError:  # not a buffer: PyTorch's tensors, iterators, ...
        return _listed(tokens)
    with view:
        if view.format != "i" or view.ndim != 1 or not view.c_contiguous:
            return _listed(tokens)
        copy = array("i")
        copy.frombytes(view.cast("B"))
        return copy


def _listed(tokens: Iterable[int]) -> list[int]:
    tolist = getattr(tokens, "tolist", None)  # many times faster than iterating where there is one
    ids = tokens if tolist is None else tolist()
    if isinstance(ids, Iterable):
        return list(cast("Iterable[int]", ids))
    raise TypeError(f"tokens must be a sequence of ints, got {type(tokens).__name__!r}")


def _is_token(token: int) -> bool:
    try:
        return 0 <= index(token) < 2**31
    except TypeError:
        return False
