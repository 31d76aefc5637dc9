"""Recovery from a failed step.

How long does it take from a failure in mid-step to the next right token? `MemoryError` is raised when the model has fed
the KV cache, and the session doesn't know of it yet. The clock runs from that instant: it counts the rollback and the
step that is tried again, and the best of a few counts. The token is compared with that of a session that nothing
disturbed. The second try may be faster than a single step, as it finds the KV cache in the processor's caches. The
models are random and small.
"""

from collections.abc import Sequence
from time import perf_counter
from typing import Any, NoReturn

from attrs import evolve
from tests.benchmarks.comparison.page import Claim, Measurement, duration, table, times
from tests.benchmarks.comparison.records import Record, alone
from tests.benchmarks.comparison.subjects import SUBJECTS, Subject, prompt

from inference_session import Session
from inference_session.engine import StateSlots


LIBRARIES = ("NumPy", "transformers")
LENGTHS, QUICK_LENGTHS = (16, 256, 2048), (16, 512)
ROUNDS = 10
SLOWEST, LEAST_ANEW = 3, 5


def measure(*, quick: bool) -> list[Record]:
    """Return the seconds of a recovery and of a step without failure, by tokens in the history."""
    lengths = QUICK_LENGTHS if quick else LENGTHS
    return [record for name in LIBRARIES for record in alone(measure_library, name, lengths)]


def measure_library(name: str, lengths: Sequence[int]) -> list[Record]:
    """Measure one library."""
    subject = SUBJECTS[name, "random"]()
    return [{"library": name, "tokens": length, **recover(subject, length)} for length in lengths]


def recover(subject: Subject, length: int) -> Record:
    """Return the seconds of a step, and of a recovery with `truncate` and without, with that history.

    They take turns, so that other load meets all, and the history grows by a few tokens meanwhile.
    """
    ways = {
        "step": subject,
        "truncate": subject,
        "without": evolve(subject, slots=without_truncate(subject.slots)),
    }
    sessions = {way: Session() for way in ways}
    for way, session in sessions.items():
        with ways[way].slots.borrow(session) as state:
            state.append(prompt(length))
        ways[way].decode(session)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        tokens: set[int] = set()
        for way, session in sessions.items():
            start = perf_counter() if way == "step" else fail(ways[way], session)
            tokens.add(ways[way].decode(session))
            seconds[way].append(perf_counter() - start)
        assert len(tokens) == 1
    for session in sessions.values():
        session.close()
    return {f"{way}_seconds": min(found) for way, found in seconds.items()}


def fail(subject: Subject, session: Session) -> float:
    """Let a step fail, and return when it did."""
    failed = 0.0

    def run_out(cache: Any, tokens: Sequence[int]) -> NoReturn:
        nonlocal failed
        subject.feed(cache, tokens)
        failed = perf_counter()
        raise MemoryError

    try:
        evolve(subject, feed=run_out).decode(session)
    except MemoryError:
        return failed
    raise AssertionError("the step did not fail")


def without_truncate(slots: StateSlots[Any]) -> StateSlots[Any]:
    """Return the same for KV caches that can't be truncated."""
    return StateSlots(create=slots.create, length=slots.length, release=slots.release)


def claims(records: Sequence[Record]) -> list[Claim]:
    """Tell how long a failed step is felt."""
    worst = max(records, key=lambda r: in_steps(r, "truncate"))
    longest = [r for r in records if r["tokens"] == max(r["tokens"] for r in records)]
    anew = " and ".join(
        f"{times(in_steps(r, 'without'))} times a step ({r['library']})" for r in longest
    )
    return [
        Claim(
            f"With `truncate` it takes at most {times(in_steps(worst, 'truncate'))} times a step "
            f"({worst['library']}, {worst['tokens']:,} tokens), however long the history is: less than "
            f"{SLOWEST} times, rollback included.",
            in_steps(worst, "truncate") < SLOWEST,
        ),
        Claim(
            f"Without, the KV cache is computed anew. At {longest[0]['tokens']:,} tokens that takes "
            f"{anew}, more than {LEAST_ANEW} times what it takes with `truncate`.",
            all(r["without_seconds"] > LEAST_ANEW * r["truncate_seconds"] for r in longest),
        ),
    ]


def in_steps(record: Record, way: str) -> float:
    """Return how many times a step it takes."""
    return float(record[f"{way}_seconds"] / record["step_seconds"])


def rows(records: Sequence[Record]) -> str:
    """Tell all."""
    return table(
        ["library, tokens", "step", "with truncate", "in steps", "without", "in steps"],
        [
            [
                f"{r['library']}, {r['tokens']:,}",
                duration(r["step_seconds"]),
                duration(r["truncate_seconds"]),
                times(in_steps(r, "truncate")),
                duration(r["without_seconds"]),
                times(in_steps(r, "without")),
            ]
            for r in records
        ],
    )


MEASUREMENT = Measurement(__doc__, measure, claims, rows)
