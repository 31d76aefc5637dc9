"""What a session adds to a decode step, as a share of the step.

Three conversations take turns, on the same KV cache's library and with the same call of the model: one by hand, on a
bare KV cache and a list; one by hand, in a session; one by the engine's `decode`. A step of a model takes milliseconds,
and differs from the next by more than a session costs. So a clock around the call of the model splits each step into
the model and the rest; the rest is short and steady, and what it is longer with a session than without is what the
session adds. It is taken in place, with the processor's caches as the model leaves them, which a loop without a model
would flatter.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch

from attrs import define
from tests.benchmarks.comparison.records import Record, alone
from tests.benchmarks.comparison.subjects import SUBJECTS, Subject, prompt

from inference_session import Session


PROMPT, WARM_UP = 64, 10
STEPS, QUICK_STEPS = 300, 40


def measure(*, quick: bool) -> list[Record]:
    """Return the seconds of a step, and those that the session adds, for each engine and model."""
    steps = QUICK_STEPS if quick else STEPS
    return [alone(measure_engine, *subject, steps) for subject in SUBJECTS]


def measure_engine(engine: str, model: str, steps: int) -> Record:
    """Measure one engine."""
    subject = SUBJECTS[engine, model]()
    tokens = prompt(PROMPT)
    with Session() as by_hand, Session() as by_engine, clock_on(subject) as clock:
        ways = [bare(subject, tokens), in_session(subject, by_hand, tokens)]
        subject.engine.prefill(by_engine, tokens)
        ways.append(lambda: subject.engine.decode(by_engine).token)
        turns = [[clock.split(way) for way in ways] for _ in range(WARM_UP + steps)][WARM_UP:]
    for turn in turns:
        assert len({step.token for step in turn}) == 1
    seconds = [median(step.seconds for step in steps) for steps in zip(*turns, strict=True)]
    rests = [median(step.rest for step in steps) for steps in zip(*turns, strict=True)]
    return {
        "engine": engine,
        "model": model,
        "step_seconds": seconds[0],
        "session_seconds": rests[1] - rests[0],
        "engine_seconds": rests[2] - rests[0],
    }


def bare(subject: Subject, tokens: Sequence[int]) -> Callable[[], int]:
    """Return a decode step on a bare KV cache and a list."""
    history = list(tokens)
    cache, _ = subject.feed(subject.slots.create(), history[:-1])

    def step() -> int:
        nonlocal cache
        cache, token = subject.feed(cache, history[-1:])
        history.append(token)
        return token

    return step


def in_session(subject: Subject, session: Session, tokens: Sequence[int]) -> Callable[[], int]:
    """Return the same in a session."""
    subject.engine.prefill(session, tokens)

    def step() -> int:
        with subject.slots.borrow(session) as state:
            fed = state.pending
            cache, token = subject.feed(state.kv_cache, fed)
            if subject.functional:
                state.kv_cache = cache
            state.advance(len(fed))
            state.append([token])
        return token

    return step


@define
class Step:
    """A step, and where its time went."""

    token: int
    seconds: float
    rest: float
    """The seconds that were not the model's."""


@define
class Clock:
    """Tells how long a step took, and how much of that was the model's."""

    in_model: float = 0

    def split(self, step: Callable[[], int]) -> Step:
        """Do a step."""
        self.in_model = 0
        start = perf_counter()
        token = step()
        seconds = perf_counter() - start
        return Step(token, seconds, seconds - self.in_model)

    def around(self, call: Callable[..., Any], evaluate: Callable[[Any], object]) -> Any:
        """Return a function that does the same, with the clock running until the result is there."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            result = call(*args, **kwargs)
            evaluate(result)
            self.in_model += perf_counter() - start
            return result

        return timed


@contextmanager
def clock_on(subject: Subject) -> Generator[Clock]:
    """Have a clock around the model's calls."""
    clock = Clock()
    with ExitStack() as patches:
        for owner, name in subject.model_calls:
            timed = clock.around(getattr(owner, name), subject.evaluate)
            patches.enter_context(patch.object(owner, name, timed))
        yield clock
