"""The current process: a fork copies sessions, and the copies must not act.

A fork hook alone can't tell: hooks run in order of registration, so one older than this module's runs first in the
child. While any fork is under way, only the operating system is trusted.
"""

import os
from threading import RLock
from typing import Final


pid: int = os.getpid()
"""The id of this process; 0 while a fork is under way, on both sides of it."""

_forks = 0
"""How many threads are forking now."""

# A lock of their own, so that a fork waits only for other forks. `_lock` explains the loops over it.
_counting: Final = RLock()
_counted: Final = iter(_counting.acquire, False)  # noqa: FBT003 never returned


def is_here(process: int) -> bool:
    """Return whether this process has the given id. Where speed matters, compare with `pid` first."""
    return process == (pid or os.getpid())


def _before() -> None:
    global pid, _forks  # noqa: PLW0603 read wherever a session is taken, so nothing is faster
    for _ in _counted:
        try:
            _forks += 1
            pid = 0
        finally:
            _counting.release()
        break


def _after_in_parent() -> None:
    global pid, _forks  # noqa: PLW0603
    here = os.getpid()
    for _ in _counted:
        try:
            if _forks:
                _forks -= 1
            if not _forks:
                pid = here
        finally:
            _counting.release()
        break


def _after_in_child() -> None:
    global pid, _forks  # noqa: PLW0603
    _counting._at_fork_reinit()  # type: ignore[attr-defined]  # pyright: ignore[reportUnknownMemberType, reportAttributeAccessIssue]
    _forks = 0
    pid = os.getpid()


if hasattr(os, "register_at_fork"):  # not on Windows, which can't fork
    os.register_at_fork(
        before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
    )
