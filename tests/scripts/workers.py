"""Workers use sessions: `workers.py (fork|spawn)`. Run by test_fork.py, in a process with no threads."""

import multiprocessing
import sys

from inference_session import Session
from inference_session.engine import StateSlots


def use(count: int) -> int:
    """Work with a session of the worker's own."""
    slots = StateSlots(create=list[int], length=len)
    with Session() as session:
        for _ in range(count):
            with slots.borrow(session) as state:
                state.append([1, 2])
                state.kv_cache.extend(state.pending)
                state.advance(2)
        return session.token_count


def main(method: str) -> None:
    """Print what workers counted, and what becomes of a session sent to one."""
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        print(*pool.map(use, [1, 2, 3]))  # noqa: T201
        try:
            pool.apply(repr, [Session()])
        except TypeError as error:
            print(type(error).__name__)  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
