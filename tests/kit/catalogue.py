"""The catalogue of broken engines: which checks must catch each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from tests.kit.right_engines import TinyEngine


E = TypeVar("E", bound=type[TinyEngine])

BROKEN: Final[dict[type[TinyEngine], Sequence[str]]] = {}
"""The broken engines, and for each the names of the checks that must catch it. Each of their modules adds some."""


def caught_by(*checks: str) -> Callable[[E], E]:
    """Say which checks must catch an engine."""

    def note(engine: E) -> E:
        BROKEN[engine] = checks
        return engine

    return note
