"""Leftovers of closed sessions."""

import gc
import sys
from random import Random
from typing import Final
from uuid import UUID

from inference_session import Session
from inference_session.testing._choices import melody
from inference_session.testing._hooks import slots_of
from inference_session.testing._run import Run


SESSIONS: Final = 12
"""Sessions in a batch."""
LEAST: Final = 5
"""The minimum number of batches: lost handles are missed only after a while."""
MOST: Final = 20
"""The number of batches if memory grows in each: the caches of libraries grow, too, but not for ever."""


def leave_nothing(run: Run) -> None:
    """Serve many sessions, one after the other, and look for memory never given back."""
    prompt = melody(0, 3, run.choose.vocab_size)
    run.calls.append(
        f"for _ in range({MOST * SESSIONS}):\n"
        f"    a = Session()\n"
        f"    engine.prefill(a, {prompt})\n"
        "    engine.decode(a)\n"
        "    with slots.borrow(a) as state: state.rewind(2)\n"
        "    engine.decode(a)\n"
        "    slots.evict(a)\n"
        "    engine.decode(a)\n"
        "    a.close()"
    )
    ids = Random(2)  # noqa: S311 not for secrets
    growth: list[int] = []
    while len(growth) < LEAST or (min(growth[1:]) >= SESSIONS and len(growth) < MOST):
        before = _blocks()
        for place in range(SESSIONS):
            try:
                _serve(run, UUID(int=ids.getrandbits(128), version=4), prompt)
            except Exception as error:
                served = len(growth) * SESSIONS + place
                raise run.broken(
                    "no error", f"after {served} sessions, {type(error).__name__}: {error}"
                ) from error
        growth.append(_blocks() - before)
    if min(growth[1:]) >= SESSIONS:
        raise run.broken(
            "as much memory in use as before, when all sessions are closed",
            f"more with each session: {sum(growth[1:]) / len(growth[1:]) / SESSIONS:.1f} blocks, on average",
        )


def _serve(run: Run, session_id: UUID, prompt: list[int]) -> None:
    with Session.with_id(session_id) as session:
        run.engine.prefill(session, list(prompt))
        run.engine.decode(session)
        if session._slots is not None:
            slots = slots_of(session)
            with slots.borrow(session) as state:
                state.rewind(2)
            run.engine.decode(session)
            slots.evict(session)
            run.engine.decode(session)


def _blocks() -> int:
    gc.collect()
    return sys.getallocatedblocks()
