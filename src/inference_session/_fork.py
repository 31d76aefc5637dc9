"""Which process this is: `fork` copies sessions, and the copies must not act."""

import os
from collections.abc import Callable


generation: int = 0
"""How many forks lie between the process that imported this and the present one."""


def in_child(do: Callable[[], None]) -> Callable[[], None]:
    """Have something done in every forked child, before anything else is."""
    if hasattr(os, "register_at_fork"):  # not on Windows, which can't fork
        os.register_at_fork(after_in_child=do)
    return do


@in_child
def _begin_generation() -> None:
    global generation  # noqa: PLW0603 read wherever a session is taken, so nothing is faster
    generation += 1
