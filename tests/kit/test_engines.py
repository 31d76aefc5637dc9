"""The kit on engines of which it's known whether they are right: no false alarm, and each broken one is caught."""

from __future__ import annotations

import pytest
from tests.kit.broken_models import RecurrentStateAhead
from tests.kit.engines import BROKEN, RIGHT
from tests.kit.right_engines import VOCAB_SIZE, TinyEngine
from tests.kit.weak_engines import WEAK, Constant

from inference_session.testing import check_engine
from inference_session.testing._checks import CHECKS


SEEDS = range(20)
CAUGHT = [(engine, check) for engine, checks in BROKEN.items() for check in checks]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("engine", RIGHT, ids=lambda engine: engine.__name__)
def test_no_false_alarm(engine: type[TinyEngine], seed: int) -> None:
    """A right engine passes, whatever sequences of calls are tried."""
    same = {"closed_sessions_leave_nothing": "the same for every seed"} if seed else {}
    check_engine(
        engine, vocab_size=VOCAB_SIZE, max_examples=2, seed=seed, skip=same, **engine.options
    )


@pytest.mark.parametrize(
    ("engine", "check"), CAUGHT, ids=[f"{engine.__name__}-{check}" for engine, check in CAUGHT]
)
def test_broken_engine_is_caught(engine: type[TinyEngine], check: str) -> None:
    """Each kind of mistake that real systems made is found by the check of the promise that it breaks, run alone."""
    with pytest.raises(AssertionError) as caught:
        check_engine(engine, vocab_size=VOCAB_SIZE, only=[check], **engine.options)
    assert str(caught.value).startswith(f"{check}: the engine breaks a promise.\n")


@pytest.mark.parametrize("engine", list(BROKEN)[::8], ids=lambda engine: engine.__name__)
def test_broken_engine_fails_as_a_whole(engine: type[TinyEngine]) -> None:
    """Who just calls `check_engine` learns that something is wrong."""
    with pytest.raises(AssertionError, match="the engine breaks a promise"):
        check_engine(engine, vocab_size=VOCAB_SIZE, **engine.options)


@pytest.mark.parametrize("seed", SEEDS)
def test_recurrent_state_ahead_is_always_found(seed: int) -> None:
    """Faults inside the model find a recurrent state that is ahead of its attention layer, whatever the seed."""
    with pytest.raises(AssertionError, match="failure_in_the_model: the engine breaks a promise"):
        check_engine(
            RecurrentStateAhead,
            vocab_size=VOCAB_SIZE,
            only=["failure_in_the_model"],
            seed=seed,
            **RecurrentStateAhead.options,
        )


def test_there_are_enough_broken_engines() -> None:
    """The catalogue doesn't shrink, each entry says what is wrong, and every check has something to catch."""
    assert len(BROKEN) >= 130
    assert all(engine.__doc__ for engine in BROKEN)
    caught = {check for checks in BROKEN.values() for check in checks}
    assert CHECKS.keys() == caught


@pytest.mark.parametrize(
    ("engine", "check"),
    [(Constant, check) for check in CHECKS] + [(engine, "rewind") for engine in [*WEAK][1:]],
    ids=lambda it: getattr(it, "__name__", it),
)
def test_weak_engine_is_no_success(engine: type[TinyEngine], check: str) -> None:
    """Where nothing could be seen, every check says so, alone too, instead of passing."""
    with pytest.raises(AssertionError, match="too weak to check") as caught:
        check_engine(engine, vocab_size=VOCAB_SIZE, only=[check], max_examples=2)
    assert str(caught.value).startswith(f"{check}: ")
    assert WEAK[engine] in str(caught.value)
