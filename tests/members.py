"""Every member of a borrowed state, to see that none of them can be used where none may be."""

from collections.abc import Callable
from typing import Any, Final

from inference_session.engine import BorrowedState, Slot


SLOT: Final = Slot(int)

MEMBERS: Final[dict[str, Callable[[BorrowedState[Any]], object]]] = {
    "kv_cache": lambda state: state.kv_cache,
    "kv_cache =": lambda state: setattr(state, "kv_cache", [6]),
    "token_history": lambda state: state.token_history,
    "kv_length": lambda state: state.kv_length,
    "pending": lambda state: state.pending,
    "append one": lambda state: state.append([6]),
    "append": lambda state: state.append([6, 6]),
    "append nothing": lambda state: state.append([]),
    "advance": lambda state: state.advance(0),
    "commit": lambda state: state.commit(),
    "rewind": lambda state: state.rewind(0),
    "reuse_prefix": lambda state: state.reuse_prefix([6]),
    "session": lambda state: state.session,
    "branch": lambda state: state.branch(),
    "take_kv_cache": lambda state: state.take_kv_cache(),
    "chunks": lambda state: state.chunks(1, keep=9),
    "state[slot]": lambda state: state[SLOT],
    "state[slot] =": lambda state: state.__setitem__(SLOT, 6),
}
"""None of them could be called without harm in somebody else's borrow."""
