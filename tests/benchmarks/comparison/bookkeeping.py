"""What a session adds to a decode step.

Two conversations take turns with the same call of the model on KV caches of the same kind: one with a bare KV cache and
a list, one in a session, as in the README. Two steps of a model differ by more than a session costs, so whole steps
can't be subtracted from each other. Instead, a clock around the model's call splits each step in two. The rest takes
longer in a session, and the difference of the medians is what the session adds. The rest is timed between calls of the
model, with the processor's caches as those leave them; in a loop without a model it would look cheaper.

Without a model, a step takes about ten times as long in a session as with a lock and two lists, which promise less.
`python -m nox -s benchmarks` measures that, and fails if a call takes a quarter longer with a million tokens than with
ten.
"""

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any

from attrs import evolve
from tests.benchmarks.comparison.page import Claim, Measurement, duration, percent, table
from tests.benchmarks.comparison.records import Record, alone
from tests.benchmarks.comparison.subjects import SUBJECTS, Subject, prompt

from inference_session import Session


PROMPT, WARM_UP = 64, 10
STEPS, QUICK_STEPS = 300, 40
LARGEST_SHARE, LARGEST_SHARE_RANDOM = 0.01, 0.15


def measure(*, quick: bool) -> list[Record]:
    """Return the seconds of a step, and those that the session adds, for each library and model."""
    steps = QUICK_STEPS if quick else STEPS
    return [alone(measure_subject, *name, steps) for name in SUBJECTS]


def measure_subject(library: str, model: str, steps: int) -> Record:
    """Measure one model."""
    untimed = SUBJECTS[library, model]()
    in_model = 0.0

    def feed(cache: Any, tokens: Sequence[int]) -> int:
        nonlocal in_model
        start = perf_counter()
        token = untimed.feed(cache, tokens)
        in_model = perf_counter() - start
        return token

    def split(step: Callable[[], int]) -> tuple[int, float, float]:
        """Do a step; return its token, its seconds, and those that were not the model's."""
        start = perf_counter()
        token = step()
        seconds = perf_counter() - start
        return token, seconds, seconds - in_model

    subject = evolve(untimed, feed=feed)
    with Session() as session:
        with subject.slots.borrow(session) as state:
            state.append(prompt(PROMPT))
        ways = [bare_steps(subject, prompt(PROMPT)), lambda: subject.decode(session)]
        turns = [[split(way) for way in ways] for _ in range(WARM_UP + steps)][WARM_UP:]
    assert all(bare[0] == owned[0] for bare, owned in turns)
    return {
        "library": library,
        "model": model,
        "step_seconds": median(bare[1] for bare, _ in turns),
        "session_seconds": median(owned[2] for _, owned in turns)
        - median(bare[2] for bare, _ in turns),
    }


def bare_steps(subject: Subject, history: list[int]) -> Callable[[], int]:
    """Return a decode step on a bare KV cache and a list."""
    cache = subject.slots.create()
    fed = 0

    def step() -> int:
        nonlocal fed
        token = subject.feed(cache, history[fed:])
        fed = len(history)
        history.append(token)
        return token

    return step


def claims(records: Sequence[Record]) -> list[Claim]:
    """Tell what a session adds at most."""
    share = {(r["library"], r["model"]): r["session_seconds"] / r["step_seconds"] for r in records}
    trained = {name: value for name, value in share.items() if name[1] != "random"}
    most, most_trained = max(share, key=share.__getitem__), max(trained, key=trained.__getitem__)
    return [
        Claim(
            f"With a small trained model, a session adds at most {percent(trained[most_trained])} of a "
            f"step ({most_trained[0]}): less than {percent(LARGEST_SHARE)}.",
            trained[most_trained] < LARGEST_SHARE,
        ),
        Claim(
            "With random models, as tiny as makes sense in a test, it adds at most "
            f"{percent(share[most])} ({most[0]}): less than {percent(LARGEST_SHARE_RANDOM)}.",
            share[most] < LARGEST_SHARE_RANDOM,
            always=False,
        ),
    ]


def rows(records: Sequence[Record]) -> str:
    """Tell all."""
    return table(
        ["library, model", "step", "session adds", "share"],
        [
            [
                f"{r['library']}, {r['model']}",
                duration(r["step_seconds"]),
                duration(r["session_seconds"]),
                percent(r["session_seconds"] / r["step_seconds"]),
            ]
            for r in records
        ],
    )


MEASUREMENT = Measurement(__doc__, measure, claims, rows)
