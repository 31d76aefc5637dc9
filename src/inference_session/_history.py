"""The token history as an engine sees it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

from attrs import define

from inference_session._ledger import Ledger


@define(eq=False, repr=False)
class TokenHistory(Sequence[int]):
    """A read-only view of the tokens: as long as the borrow lasts, and always current."""

    _read: Callable[[], Ledger[Any]]

    @overload
    def __getitem__(self, position: int, /) -> int: ...
    @overload
    def __getitem__(self, position: slice, /) -> list[int]: ...
    def __getitem__(self, position: int | slice, /) -> int | list[int]:
        history = self._read().history
        if isinstance(position, slice):
            return history[position].tolist()
        return history[position]

    def __len__(self) -> int:
        return len(self._read().history)

    def __iter__(self) -> Iterator[int]:
        return iter(self[:])

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Sequence):
            return self[:] == list(other)  # pyright: ignore[reportUnknownArgumentType]
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]  # it changes

    def __repr__(self) -> str:
        return f"<token history, {len(self)} tokens>"
