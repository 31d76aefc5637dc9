"""What the calls of a borrow cost with ever longer histories, and with ever more sessions."""

import gc
from array import array
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from tests.benchmarks.comparison.records import Record
from tests.benchmarks.measuring import BATCH, Measure, fastest_of, timed
from tests.benchmarks.steps import (
    TOKEN,
    Locked,
    advance,
    append,
    borrow,
    rewind,
    session_of,
    slots,
    step,
    timed_at,
)

from inference_session import Session


SIZES = tuple(10**power for power in range(1, 8))
COUNTS = tuple(10**power for power in range(7))
QUICK_SIZES, QUICK_COUNTS = (10, 100_000), (1, 10_000)
SECONDS, QUICK_SECONDS = 0.5, 0.05
LENGTH = 10
"""Tokens of a session, where it is about their number."""

Call = Callable[[Session, int], None]
CALLS: dict[str, Call] = {
    "borrow": borrow,
    "append": append,
    "advance": advance,
    "rewind": rewind,
}


def measure(*, quick: bool) -> list[Record]:
    """Return the seconds of each call, by tokens in the history, and by sessions that there are."""
    seconds = QUICK_SECONDS if quick else SECONDS
    sizes, counts = (QUICK_SIZES, QUICK_COUNTS) if quick else (SIZES, COUNTS)
    return [*by_tokens(sizes, seconds), *by_sessions(counts, seconds)]


def by_tokens(sizes: Sequence[int], seconds: float) -> list[Record]:
    """Return the seconds of each call in one borrow, and of a whole borrow, by tokens in the history."""
    for size in sizes:
        session_of(size)  # so that the first round doesn't pay for it
    measures = {
        (name, size): timed_at(size, call) for name, call in CALLS.items() for size in sizes
    }
    measures |= {("reuse_prefix", size): reuse(size) for size in sizes}
    calls = {"reuse_prefix": 1}
    return [
        {"by": "tokens", "count": size, "call": name, "seconds": found / calls.get(name, BATCH)}
        for (name, size), found in fastest_of(measures, seconds).items()
    ]


def reuse(size: int) -> Measure:
    """Measure `reuse_prefix` of a prompt, a buffer of C ints, that differs in the last token."""
    prompt = np.full(size, TOKEN[0], np.int32)
    prompt[-1] += 1
    return partial(_reuse, size, prompt)


def _reuse(size: int, prompt: NDArray[np.int32]) -> float:
    with slots.borrow(session_of(size)) as state:
        seconds = timed(lambda _: state.reuse_prefix(prompt), 1)()
        state.rewind(size - 1, pending=0)
        state.append(TOKEN)
        state.kv_cache.extend(TOKEN)
        state.advance(1)
    return seconds


def by_sessions(counts: Sequence[int], seconds: float) -> list[Record]:
    """Return the seconds of a borrow with a call in it, of sessions at random, and of the same by hand."""
    ids = np.random.default_rng(0)
    sessions = [new_session() for _ in range(max(counts))]
    by_hand = [new_by_hand() for _ in range(max(counts))]
    gc.collect()
    gc.freeze()  # a million objects more to look at are no matter of this comparison

    def visits(name: str, count: int) -> Measure:
        def measure() -> float:
            chosen: list[int] = ids.integers(0, count, BATCH).tolist()
            if name == "by hand":
                return timed(partial(step_all_by_hand, [by_hand[place] for place in chosen]))()
            picked = [sessions[place] for place in chosen]
            taken = timed(partial(call_all, VISITS[name], picked))()
            for session in picked:
                restore(session)
            return taken

        return measure

    measures = {
        (name, count): visits(name, count) for name in (*VISITS, "by hand") for count in counts
    }
    return [
        {"by": "sessions", "count": count, "call": name, "seconds": found / BATCH}
        for (name, count), found in fastest_of(measures, seconds).items()
    ]


def reuse_once(session: Session, _: int) -> None:
    """Take the place of the history by one that differs in the last token."""
    with slots.borrow(session) as state:
        state.reuse_prefix(OTHER)
        state.kv_cache.extend(TOKEN)
        state.advance(1)


VISITS: dict[str, Call] = {**CALLS, "reuse_prefix": reuse_once, "step": step}
OTHER = array("i", TOKEN * LENGTH)
OTHER[-1] += 1


def call_all(call: Call, sessions: Sequence[Session], _: int) -> None:
    """Do something to each session, once."""
    for session in sessions:
        call(session, 1)


def step_all_by_hand(sessions: Sequence[Locked], _: int) -> None:
    """Do what one would write for a decode step to each session, once."""
    for session in sessions:
        step_one_by_hand(session)


def step_one_by_hand(session: Locked) -> None:
    """Do what one would write for a decode step."""
    with session.lock:
        session.token_history.append(0)
        session.kv_cache.append(0)


def new_session() -> Session:
    """Return a session with some tokens, all of them in the KV cache."""
    session = Session()
    restore(session)
    return session


def new_by_hand() -> Locked:
    """Return the same, written by hand."""
    session = Locked()
    session.token_history += TOKEN * LENGTH
    session.kv_cache += TOKEN * LENGTH
    return session


def restore(session: Session) -> None:
    """Have the session hold the tokens that it began with."""
    with slots.borrow(session) as state:
        state.rewind(min(LENGTH - 1, len(state.token_history)), pending=0)
        missing = TOKEN * (LENGTH - state.kv_length)
        state.append(missing)
        state.kv_cache.extend(missing)
        state.advance(len(missing))
