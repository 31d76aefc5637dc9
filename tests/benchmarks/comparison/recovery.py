"""How long it takes from a failure in mid-step to the next right token, with `truncate` and without.

The step fails in the model, with a part of the new keys and values in the KV cache. The clock runs from that instant:
it counts the rollback and the step that is tried again. The token is compared with that of an undisturbed session.
"""

from time import perf_counter
from typing import Any, NoReturn
from unittest.mock import patch

from tests.benchmarks.comparison.records import Record, alone
from tests.benchmarks.comparison.subjects import SUBJECTS, Subject, prompt

from inference_session import Session
from inference_session.engine import StateSlots


ENGINES = ("NumPy", "transformers")
LENGTHS = (16, 64, 256, 1024, 2048)
QUICK_LENGTHS = (16, 512)
ROUNDS = 10


def measure(*, quick: bool) -> list[Record]:
    """Return the seconds of a recovery and of a step without failure, by tokens in the history."""
    lengths = QUICK_LENGTHS if quick else LENGTHS
    return [record for name in ENGINES for record in alone(measure_engine, name, lengths)]


def measure_engine(name: str, lengths: tuple[int, ...]) -> list[Record]:
    """Measure one engine."""
    subject = SUBJECTS[name, "random"]()
    records: list[Record] = []
    for length in lengths:
        step, recoveries = recover(subject, length)
        records += [
            {
                "engine": name,
                "tokens": length,
                "truncate": truncate,
                "step_seconds": step,
                "recovery_seconds": recovery,
            }
            for truncate, recovery in recoveries.items()
        ]
    return records


def recover(subject: Subject, length: int) -> tuple[float, dict[bool, float]]:
    """Return the seconds of a step, and of a recovery with `truncate` and without, at a history of that length.

    They take turns, so that other load meets all, and the history grows by a few tokens meanwhile.
    """
    engine: Any = subject.engine
    slots = {True: subject.slots, False: without_truncate(subject.slots)}
    steps: list[float] = []
    recoveries: dict[bool, list[float]] = {truncate: [] for truncate in slots}
    with Session() as undisturbed, Session() as truncated, Session() as computed_anew:
        sessions = {True: truncated, False: computed_anew}
        begin(subject, undisturbed, length)
        for truncate, session in sessions.items():
            with patch.object(engine, "slots", slots[truncate]):
                begin(subject, session, length)
        for _ in range(ROUNDS):
            start = perf_counter()
            expected = engine.decode(undisturbed).token
            steps.append(perf_counter() - start)
            for truncate, session in sessions.items():
                with patch.object(engine, "slots", slots[truncate]):
                    failed = fail(subject, session)
                    token = engine.decode(session).token
                    recoveries[truncate].append(perf_counter() - failed)
                assert token == expected
    return min(steps), {truncate: min(seconds) for truncate, seconds in recoveries.items()}


def begin(subject: Subject, session: Session, length: int) -> None:
    """Fill a session."""
    subject.engine.prefill(session, prompt(length))
    subject.engine.decode(session)


def fail(subject: Subject, session: Session) -> float:
    """Let a step fail, and return when it did."""
    assert subject.half_way is not None
    owner, name = subject.half_way
    failed = 0.0

    def run_out(*args: object, **kwargs: object) -> NoReturn:
        nonlocal failed
        failed = perf_counter()
        raise MemoryError

    with patch.object(owner, name, run_out):
        try:
            subject.engine.decode(session)
        except MemoryError:
            return failed
    raise AssertionError("the step did not fail")


def without_truncate(slots: StateSlots[Any]) -> StateSlots[Any]:
    """Return the same for KV caches that can't be truncated."""
    return StateSlots(create=slots.create, length=slots.length, release=slots.release)
