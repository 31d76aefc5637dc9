"""What the kit tells, what it can be told, and that it leaves nothing behind."""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from threading import Event, Lock, RLock, Thread
from typing import Any, ClassVar, cast
from unittest import SkipTest
from weakref import WeakSet

import pytest
from tests.kit.broken_engines import (
    DecodeReturnsTheLast,
    LockNotReleased,
    OneCacheForAll,
    PositionsRestart,
    SamplerWithoutSeed,
)
from tests.kit.broken_models import RowsMixedUp, StaticCacheNotGivenBack, StaticCacheNotReset
from tests.kit.engines import BROKEN, RIGHT
from tests.kit.paged_engines import Paged
from tests.kit.right_engines import (
    VOCAB_SIZE,
    Batching,
    Cache,
    Filing,
    FunctionalWithoutTruncate,
    Minimal,
    TinyEngine,
)
from tests.kit.test_engines import SEEDS
from tests.kit.weak_engines import Constant

from inference_session import Session
from inference_session.engine import BorrowedState, DecodeResult, PrefillResult, StateSlots
from inference_session.exceptions import SessionBusyError, SessionClosedError, StateMismatchError
from inference_session.testing import check_engine, parametrize_with_checks
from inference_session.testing._checks import ANY, CHECKS, between_borrows
from inference_session.testing._choices import Choices
from inference_session.testing._faults import Fault, Pause, fail_step, race
from inference_session.testing._kit import Kit
from inference_session.testing._observer import Watch
from inference_session.testing._scenario import (
    DECODE,
    BrokenError,
    ConclusiveError,
    Reference,
    Scenario,
    prefill,
)


ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "testing.md"


def a_kit(engine: Callable[[], TinyEngine], **options: Any) -> Kit:
    """Return a kit, as `check_engine` makes it by default."""
    arguments: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "max_tokens": 64,
        "held": None,
        "fail_in": (),
        "max_examples": 20,
        "seed": 0,
    }
    return Kit(engine, **{**arguments, **options})


def message(engine: Callable[[], TinyEngine], check: str, *, seed: int = 0) -> str:
    """Return what is said of a broken engine."""
    options: dict[str, Any] = getattr(engine, "options", {})
    with pytest.raises(AssertionError) as caught:
        check_engine(engine, vocab_size=VOCAB_SIZE, only=[check], seed=seed, **options)
    return str(caught.value)


# What it tells


def test_message() -> None:
    """A failure names the promise, what was expected, the shortest sequence of calls, and how to run it again."""
    text = message(DecodeReturnsTheLast, "tokens_reach_the_session", seed=3)
    promise = CHECKS["tokens_reach_the_session"].promise
    assert re.fullmatch(
        rf"""tokens_reach_the_session: the engine breaks a promise\.
Promise:   {re.escape(promise)}
Expected:  the tokens of session a to be \[(\d+), \1\]
Got:       \[\1, \d+\]
Shortest sequence of calls found that shows it:
    engine = make_engine\(\)
    a = Session\.with_id\(UUID\("[0-9a-f-]+"\)\)
    engine\.prefill\(a, \[\1\]\)
    engine\.decode\(a\)
To run it again:
    check_engine\(make_engine, vocab_size=50, max_tokens=64, only=\["tokens_reach_the_session"\], .*, seed=3\)
    pytest -k tokens_reach_the_session""",
        text,
    ), text


def test_wrong_token_is_told() -> None:
    """The last call says which token came, and which one should have come."""
    text = message(PositionsRestart, "prefill_in_pieces")
    expected, after, got = re.findall(
        r"^Expected:  token (\d+) after the tokens (\[.*\]), as of a fresh session with the same id\n"
        r"Got:       (\d+)$",
        text,
        re.MULTILINE,
    )[0]
    assert f"    engine.decode(a)  # -> {got}, expected {expected}\n" in text
    assert after.count(",") <= 2


@pytest.mark.parametrize(
    "engine",
    [DecodeReturnsTheLast, OneCacheForAll, PositionsRestart, RowsMixedUp, StaticCacheNotReset],
    ids=lambda engine: engine.__name__,
)
def test_same_seed_same_calls(engine: type[TinyEngine]) -> None:
    """What was found once is found again by the same seed."""
    check = BROKEN[engine][0]
    assert message(engine, check, seed=5) == message(engine, check, seed=5)


def test_faults_are_told() -> None:
    """The calls say where which error was raised, and a step that hangs is no sequence that takes for ever."""
    text = message(LockNotReleased, "failure_at_append")
    assert re.search(r"engine\.decode\(a\)  # \w+ is raised (before|after) append\n", text)
    assert "is there a lock that a failed step doesn't release?" in text


def test_unsteady_engine_is_told() -> None:
    """An engine that answers differently each time is found out, though what it did can't be shown again."""
    text = message(SamplerWithoutSeed, "replay_gives_the_same_tokens")
    assert "Expected:  token" in text or "again" in text


def test_unused_sessions_are_not_shown() -> None:
    """What is shown is what is needed: no session that no call uses, and no name that isn't explained."""
    text = message(PositionsRestart, "decode_from_the_cache")
    calls = text.partition("that shows it:\n")[2].partition("To run")[0]
    made = re.findall(r"^    (\w) = Session", calls, re.MULTILINE)
    assert made
    for name in made:
        assert len(re.findall(rf"\b{name}\b", calls)) > 1
    assert set(re.findall(r"engine\.\w+\((\w)", calls)) == set(made)


def test_shortening_takes_limited_time() -> None:
    """When the time is over, the shortest sequence so far is what is told."""
    kit = a_kit(DecodeReturnsTheLast, shrink_seconds=0.0)
    with pytest.raises(AssertionError, match="the engine breaks a promise") as caught:
        kit.run(CHECKS["tokens_reach_the_session"])
    shortest = message(DecodeReturnsTheLast, "tokens_reach_the_session")
    assert len(str(caught.value)) >= len(shortest)


def test_cache_of_two_sessions_is_named() -> None:
    """An error of an engine that gives one KV cache to two sessions is told as that, and leads to its cause."""
    with pytest.raises(AssertionError, match="each KV cache to be one session's") as caught:
        check_engine(OneCacheForAll, vocab_size=VOCAB_SIZE, only=["sessions_interleaved"])
    assert "another session has" in str(caught.value)
    assert "StateMismatchError: create: the KV cache" in str(caught.value)
    assert isinstance(caught.value.__cause__, StateMismatchError)


def test_cache_of_two_sessions_without_release_is_named() -> None:
    """The same where caches are not released, and it might have been harmless."""

    class Shared(OneCacheForAll):
        def make_slots(self) -> StateSlots[Any]:
            return StateSlots(create=self.create, length=self.length, truncate=self.truncate)

    text = message(Shared, "sessions_interleaved")
    assert "`create` returned a KV cache that another session has" in text


def test_errors_in_rollbacks_are_told() -> None:
    """An error of `truncate` or `release` that the library gets over, after a failed step, isn't overlooked."""

    class Fails(TinyEngine):
        def truncate(self, cache: Any, length: int) -> Any:
            raise ZeroDivisionError

    assert "`truncate` raised ZeroDivisionError" in message(Fails, "failure_before_advance")


def test_weakness_has_two_meanings() -> None:
    """Who has a weak engine learns both things that it may mean."""
    with pytest.raises(AssertionError, match="too weak to check") as caught:
        check_engine(Constant, vocab_size=VOCAB_SIZE, only=["engine_runs"])
    assert "hardly depend on the prompt" in str(caught.value)
    assert "is not what the model is given" in str(caught.value)


@pytest.mark.parametrize(
    ("results", "told"),
    [
        (7, "Expected:  a sequence of DecodeResults\nGot:       int"),
        ([], "Expected:  1 results\nGot:       0 results"),
        ([7], "Expected:  a DecodeResult\nGot:       int"),
    ],
)
def test_odd_results_of_batches(results: object, told: str) -> None:
    """What isn't a batch's result isn't taken for one."""

    class Odder(Batching):
        def decode_batch(self, sessions: Sequence[Session], /) -> Any:
            return results

    assert told in message(Odder, "batches")


def test_interrupt_of_a_step_made_to_fail() -> None:
    """A real Ctrl-C, before the kit's own error was raised, ends the check."""
    with a_run(lambda: Odd(interrupt, 2)) as run:
        chat = run.open()
        run.prefill(chat, [1, 2, 3])
        run.decode(chat)
        fault = Fault(lambda event: False, 0, MemoryError())
        with pytest.raises(KeyboardInterrupt):
            fail_step(run, chat, DECODE, fault)


def test_functions_not_reported_are_passed_on() -> None:
    """A session that is watched has all functions of its engine."""

    def weigh(cache: object) -> int:
        return 7

    functions = Filing().slots
    slots = StateSlots(
        create=functions.create,
        length=functions.length,
        dump=functions.dump,
        load=functions.load,
        nbytes=weigh,
    )
    watched = Watch().functions(slots)
    assert (watched.dump, watched.load, watched.nbytes) == (slots.dump, slots.load, weigh)
    assert (watched.truncate, watched.share, watched.release) == (None, None, None)


def test_error_of_the_engine_is_the_cause() -> None:
    """The traceback leads to where an unexpected error came from."""

    class Crashes(TinyEngine):
        def decode(self, session: Session, /) -> DecodeResult:
            raise ZeroDivisionError("of the engine")

    with pytest.raises(AssertionError, match="ZeroDivisionError: of the engine") as caught:
        check_engine(Crashes, vocab_size=VOCAB_SIZE)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("engine", "check", "reason"),
    [
        (FunctionalWithoutTruncate, "failure_in_truncate", "no `truncate`"),
        (Minimal, "failure_between_chunks", "more than one piece"),
    ],
)
def test_what_never_happens_is_skipped(
    engine: Callable[[], TinyEngine], check: str, reason: str
) -> None:
    """A check of something that an engine doesn't do is no success, but skipped."""
    with pytest.raises(SkipTest, match=reason):
        a_kit(engine).run(CHECKS[check])
    with pytest.raises(SkipTest, match=reason):
        check_engine(engine, vocab_size=VOCAB_SIZE, only=[check])
    for only in [check, "rewind"], ["rewind", check]:
        check_engine(engine, vocab_size=VOCAB_SIZE, only=only)


class Odd(TinyEngine):
    """An engine that does something odd once, when it's asked to for the n-th time."""

    def __init__(self, odd: Callable[[Session], Any], when: int) -> None:
        super().__init__()
        self.odd = odd
        self.when = when

    def decode(self, session: Session, /) -> DecodeResult:
        """Decode, or do what is odd."""
        self.when -= 1
        if self.when == 0:
            result: DecodeResult = self.odd(session)
            return result
        return super().decode(session)


def interrupt(session: Session) -> None:
    """Do what Ctrl-C does."""
    raise KeyboardInterrupt


def crash(session: Session) -> None:
    """Fail."""
    raise ZeroDivisionError


@pytest.mark.parametrize("when", range(1, 12))
@pytest.mark.parametrize("check", ["failure_at_append", "close_in_mid_step", "rewind"])
def test_odd_errors(check: str, when: int) -> None:
    """An error of the engine's own is found whenever it comes; a real Ctrl-C ends the check."""
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        check_engine(lambda: Odd(crash, when), vocab_size=VOCAB_SIZE, only=[check])
    with pytest.raises(KeyboardInterrupt):
        check_engine(lambda: Odd(interrupt, when), vocab_size=VOCAB_SIZE, only=[check])


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (None, "Got:       NoneType"),
        (7, "Got:       int"),
        (DecodeResult(cast("Any", 7.0)), "Got:       7.0 of type float"),
        (DecodeResult(VOCAB_SIZE), f"Got:       {VOCAB_SIZE} of type int"),
        (DecodeResult(token=True), "Got:       True of type bool"),
    ],
)
def test_odd_results(result: object, got: str) -> None:
    """What isn't a token isn't taken for one."""

    def odd(session: Session) -> object:
        return result

    assert got in message(lambda: Odd(odd, 1), "tokens_reach_the_session")


def test_odd_result_of_prefill() -> None:
    """An engine that returns nothing is told so."""

    class ReturnsNothing(TinyEngine):
        def prefill(self, session: Session, tokens: Sequence[int], /) -> Any:
            super().prefill(session, tokens)

    assert "Expected:  a PrefillResult" in message(ReturnsNothing, "tokens_reach_the_session")


def test_error_of_the_reference_is_told() -> None:
    """An engine that can't take at once what it takes in pieces is told, by the calls that show it."""

    class ShortPrompts(TinyEngine):
        def validate(self, tokens: Sequence[int]) -> None:
            super().validate(tokens)
            if len(tokens) > 6:
                raise RuntimeError("too long")

    text = message(ShortPrompts, "sessions_interleaved")
    assert re.search(
        r"Got:       RuntimeError: too long\n.*:\n    engine = make_engine\(\)\n    a = .*\n"
        r"    engine\.prefill\(a, \[.*\]\)\n    engine\.decode\(a\)\n",
        text,
    )


def test_error_of_the_strength_is_told() -> None:
    """An engine that fails where its strength is tried is not called weak: the error is named, as its cause is."""

    class ShortPrompts(TinyEngine):
        def validate(self, tokens: Sequence[int]) -> None:
            super().validate(tokens)
            if len(tokens) > 6:
                raise ZeroDivisionError("too long")

    with pytest.raises(AssertionError, match="ZeroDivisionError: too long") as caught:
        check_engine(ShortPrompts, vocab_size=VOCAB_SIZE, only=["empty_session_is_refused"])
    assert str(caught.value).startswith("engine_runs: the engine breaks a promise")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_borrow_left_open_by_close() -> None:
    """A session that was closed in the middle of a step is freed when that has ended, if it ever does."""

    class LeavesItOpen(TinyEngine):
        def decode(self, session: Session, /) -> DecodeResult:
            self.block = self.slots.borrow(session)
            with ExitStack() as stack:
                state = self.block.__enter__()
                if not session.closed:
                    stack.push(self.block)
                result = self.decode_borrowed(session, state)
                if session.closed:
                    stack.pop_all()
                    raise SessionClosedError(session.id)
                return result

    text = message(LeavesItOpen, "close_in_mid_step")
    assert "Expected:  the state of a closed session to be freed" in text
    gc.collect()


def test_swayed_engine() -> None:
    """An engine that answers other when it has served many sessions is caught, though no short sequence shows it."""

    class Tires(TinyEngine):
        def __init__(self) -> None:
            super().__init__()
            self.served = 0

        def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
            self.served += not session.token_count
            return super().prefill(session, tokens)

        def sample(self, session: Session, state: BorrowedState[Any], out: int) -> int:
            return super().sample(session, state, out + self.served // 20)

    text = message(Tires, "decode_from_the_cache")
    assert re.search(r"# \d+ sessions, one at a time: prefill, decode, close\n", text)
    assert "as of a new engine" in text


class Doubling(TinyEngine):
    """An engine that decodes twice instead of once, from the second time on."""

    served = 0

    def decode(self, session: Session, /) -> DecodeResult:
        """Decode, and again."""
        self.served += 1
        if self.served == 2:
            super().decode(session)
        return super().decode(session)


class Refusing(TinyEngine):
    """An engine that is always busy, after a first decode."""

    served = 0

    def decode(self, session: Session, /) -> DecodeResult:
        """Decode, once."""
        self.served += 1
        if self.served > 1:
            raise SessionBusyError(session.id)
        return super().decode(session)


class Forking(TinyEngine):
    """An engine that answers from a copy, if the session is busy."""

    def decode(self, session: Session, /) -> DecodeResult:
        """Decode, somehow."""
        try:
            return super().decode(session)
        except SessionBusyError:
            return DecodeResult(0)


class Stuck(TinyEngine):
    """An engine with a lock that's never released, taken by the n-th call or all after it."""

    def __init__(self, lock: Any, when: int) -> None:
        super().__init__()
        self.lock = lock
        self.when = when

    def decode(self, session: Session, /) -> DecodeResult:
        """Decode, once."""
        self.when -= 1
        if self.when <= 0:
            self.lock.acquire()
        return super().decode(session)


@pytest.mark.parametrize(
    ("engine", "skip", "got"),
    [
        (lambda: Stuck(RLock(), 1), 99, "it hangs"),
        (lambda: Stuck(Lock(), 2), 99, "one hangs"),
        (lambda: Stuck(Lock(), 2), 8, "the second step waits for the first"),
        (lambda: Odd(crash, 2), 99, "ZeroDivisionError"),
        (Doubling, 99, "one after the other"),
        (Refusing, 99, "SessionBusyError in both"),
        (Forking, 3, "both steps succeeded"),
    ],
)
def test_races(engine: Callable[[], TinyEngine], skip: int, got: str) -> None:
    """Two steps at once end, one of them well, and the other with SessionBusyError if the first was in its borrow."""
    with pytest.raises((BrokenError, ConclusiveError)) as caught:
        race_to_decode(engine, skip)
    assert got in str(caught.value)


def test_engine_without_borrows() -> None:
    """An engine that never borrows leaves nothing behind, but that is no merit."""

    class Aloof(TinyEngine):
        def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
            return PrefillResult(len(tokens))

        def decode(self, session: Session, /) -> DecodeResult:
            return DecodeResult(7)

    assert "too weak to check" in message(Aloof, "closed_sessions_leave_nothing")
    assert "Got:       []" in message(Aloof, "tokens_reach_the_session")


def test_second_failure_hangs() -> None:
    """Once a step has failed, none is waited for in vain, not even one that is to fail, too."""

    def fail_stuck() -> None:
        with a_run(lambda: Stuck(Lock(), 1)) as run:
            chat = run.open()
            run.prefill(chat, [1, 2, 3])
            run.decode(chat)
            run.failed = True
            fail_step(run, chat, DECODE, Fault(lambda event: False, 0, MemoryError()))

    with pytest.raises(ConclusiveError, match="still waits"):
        fail_stuck()


def test_sessions_that_are_full() -> None:
    """Whatever is chosen to be done, no session gets more tokens than the kit promises."""
    with a_run(TinyEngine) as run:
        chat = run.open()
        run.prefill(chat, [1] * 64)
        for what in ANY:
            what(run, chat, [1, 2, 3], 15)
            assert len(chat.history) <= 64
            run.reuse_prefix(chat, [1] * 64)


@contextmanager
def a_run(engine: Callable[[], TinyEngine]) -> Generator[Scenario]:
    """Give a run, as checks get it, but without anything to choose."""
    choices = Choices(cast("Any", None), VOCAB_SIZE, max_tokens=64)
    with Scenario(engine, None, (), Watch(), Reference(TinyEngine, {}), choices) as run:
        yield run


def race_to_decode(engine: Callable[[], TinyEngine], skip: int) -> None:
    """Decode a session twice at once; the first step stops at one of its events."""
    with a_run(engine) as run:
        chat = run.open()
        run.prefill(chat, [1, 2, 3])
        run.decode(chat)
        race(run, chat, DECODE, DECODE, Pause(lambda event: True, skip, chat))


def test_a_race_whose_order_the_tokens_do_not_tell() -> None:
    """Where the prompt is just the token that was decoded, the order is that in which the results are right."""
    with a_run(TinyEngine) as run:
        chat = run.open()
        found = (
            (first, second)
            for first, second in product(range(VOCAB_SIZE), repeat=2)
            if second == run.reference.next_token(chat.id, [first, second])
            and second != run.reference.next_token(chat.id, [first])
        )
        first, second = next(found)
        run.prefill(chat, [first])
        race(run, chat, DECODE, prefill([second]), Pause(between_borrows, 0, chat))
        assert chat.history == [first, second, second]


def test_a_race_whose_results_are_right_in_no_order() -> None:
    """The tokens can be those of the steps, and the steps wrong."""

    class Shifted(TinyEngine):
        def sample(self, session: Session, state: BorrowedState[Any], out: int) -> int:
            return (out + 1) % VOCAB_SIZE

    with a_run(Shifted) as run:
        chat = run.open()
        run.prefill(chat, [1, 2, 3])
        with pytest.raises(BrokenError, match="as of a fresh session"):
            race(run, chat, DECODE, DECODE, Pause(between_borrows, 0, chat))


def test_testing_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra, the error says how to install it."""
    for name in [it for it in sys.modules if it.startswith("inference_session.testing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ModuleNotFoundError, match=r"inference-session\[testing\]"):
        importlib.import_module("inference_session.testing")


# What it can be told


def test_unknown_checks() -> None:
    """A check that doesn't exist is an error that lists those that do."""
    names = {"rewind": "why", "rewnd": "why"}
    with pytest.raises(ValueError, match="'rewnd'"):
        check_engine(TinyEngine, vocab_size=VOCAB_SIZE, only=names)
    with pytest.raises(ValueError, match=r"no check is called 'rewnd'; the checks are engine_runs"):
        check_engine(TinyEngine, vocab_size=VOCAB_SIZE, skip=names)


def test_nothing_to_check() -> None:
    """Neither a name instead of names, nor no name at all, nor skipping without a reason, goes unnoticed."""
    with pytest.raises(TypeError, match="collection of names"):
        check_engine(TinyEngine, vocab_size=VOCAB_SIZE, only="rewind")
    with pytest.raises(ValueError, match="nothing would be checked"):
        check_engine(TinyEngine, vocab_size=VOCAB_SIZE, only=[])
    with pytest.raises(TypeError, match="skip must be a mapping"):
        check_engine(TinyEngine, vocab_size=VOCAB_SIZE, skip=cast("Any", ["rewind"]))


@pytest.mark.parametrize(
    "wrong",
    [{"vocab_size": 1}, {"max_examples": 0}, {"vocab_size": True}, {"seed": -1}, {"seed": 1.5}],
)
def test_wrong_numbers(wrong: dict[str, Any]) -> None:
    """Numbers with which nothing could be checked are refused."""
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        check_engine(TinyEngine, **cast("Any", {"vocab_size": VOCAB_SIZE, **wrong}))
    with pytest.raises(TypeError, match="make_engine must return a new engine"):
        check_engine(cast("Any", TinyEngine()), vocab_size=VOCAB_SIZE)


def test_engine_must_be_new() -> None:
    """An engine that is the same each time is refused, as it would be compared with itself."""
    engine = TinyEngine()
    with pytest.raises(ValueError, match="new engine"):
        check_engine(lambda: engine, vocab_size=VOCAB_SIZE)


def test_skip() -> None:
    """What is skipped isn't run; where that is all, it is no success."""
    with pytest.raises(SkipTest, match="all checks are skipped"):
        check_engine(
            DecodeReturnsTheLast,
            vocab_size=VOCAB_SIZE,
            only=["tokens_reach_the_session", "closed_session_is_refused"],
            skip={"tokens_reach_the_session": "known", "closed_session_is_refused": "known"},
        )


def test_checks_become_tests() -> None:
    """Each check is a test of its own, and what is skipped shows, with its reason."""
    mark = parametrize_with_checks(
        TinyEngine, vocab_size=VOCAB_SIZE, only=["rewind", "reuse_prefix"], skip={"rewind": "why"}
    )
    assert mark.mark.args[0] == "check"
    skipped, run = mark.mark.args[1]
    assert (skipped.id, run.id) == ("rewind", "reuse_prefix")
    assert [it.kwargs for it in skipped.marks] == [{"reason": "why"}]
    assert not run.marks
    run.values[0]()


SKIPPED = 8
"""Checks that a plain engine without `truncate` skips, and `rewind`."""


def suite(folder: Path, engine: str, options: str = "") -> str:
    """Run all checks of an engine as a test suite would, and return what pytest says."""
    module, _, name = engine.rpartition(".")
    test = folder / "test_engine.py"
    test.write_text(
        "from inference_session.testing import parametrize_with_checks\n"
        f"from {module} import {name} as Engine\n"
        f"@parametrize_with_checks(Engine, vocab_size=50, max_examples=2{options})\n"
        "def test_engine(check):\n"
        "    check()\n"
    )
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-rsP",
        "-v",
    ]
    result = subprocess.run(
        [*command, "--rootdir", ".", "test_engine.py"],
        cwd=folder,
        env={
            **environment(),
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert [path.name for path in folder.iterdir()] == ["test_engine.py"]
    return result.stdout


def test_in_a_suite(tmp_path: Path) -> None:
    """One line in a test suite is enough; nothing is written, and no warning comes of it."""
    engine = "tests.kit.right_engines.FunctionalWithoutTruncate"
    said = suite(tmp_path, engine, ", skip={'rewind': 'not now'}")
    assert f"{len(CHECKS) - SKIPPED} passed, {SKIPPED} skipped" in said, said
    assert "not now" in said
    assert "gives StateSlots no `truncate`" in said
    assert re.search(r"The longest history had \d+ tokens\.", said)


def test_typo_is_one_failure(tmp_path: Path) -> None:
    """An engine that doesn't run at all fails once, with one traceback; all else is skipped, and says why."""
    said = suite(tmp_path, "tests.kit.broken_models.Typo")
    assert f"1 failed, {len(CHECKS) - 1} skipped" in said, said
    assert said.count("AttributeError: 'Typo' object has no attribute 'smaple'") >= 1
    assert "this engine doesn't run at all, as another test shows" in said


def test_weakness_is_one_failure(tmp_path: Path) -> None:
    """An engine that is too weak fails once; what can't be shown of it is skipped."""
    said = suite(tmp_path, "tests.kit.weak_engines.Constant")
    assert f"1 failed, {len(CHECKS) - 1} skipped" in said, said
    assert "this engine is too weak to check, as another test shows" in said


def environment() -> dict[str, str]:
    """Return the environment, without what would tell Hypothesis or coverage where to write."""
    return {name: value for name, value in os.environ.items() if "HYPOTHESIS" not in name}


# Its options


class Model:
    """A model whose parts can be called in each way."""

    def method(self, value: int) -> int:
        """Return a value."""
        return value

    @staticmethod
    def static(value: int) -> int:
        """Return a value."""
        return value

    @classmethod
    def of_class(cls, value: int) -> int:
        """Return a value."""
        return value


class Modelled(TinyEngine):
    """An engine that calls all parts of its model."""

    options: ClassVar[dict[str, Any]] = {
        "fail_in": [(Model, "method"), (Model, "static"), (Model, "of_class"), (json, "dumps")]
    }

    def sample(self, session: Session, state: BorrowedState[Any], out: int) -> int:
        """Choose a token by what the model returns."""
        model = Model()
        value = model.of_class(model.static(model.method(out)))
        return super().sample(session, state, value + len(json.dumps([])))


def test_parts_are_as_they_were() -> None:
    """Whatever can be called can be made to fail; afterwards, classes and modules are as before."""
    before = [dict(vars(it)) for it in (Model, json)]
    check_engine(Modelled, vocab_size=VOCAB_SIZE, only=["failure_in_the_model"], **Modelled.options)
    assert [dict(vars(it)) for it in (Model, json)] == before


def test_parts_must_be_there() -> None:
    """What is no part of a model is refused, and nothing is checked."""
    with pytest.raises(ValueError, match="'Model' has no callable 'forward'"):
        check_engine(Modelled, vocab_size=VOCAB_SIZE, fail_in=[(Model, "forward")])
    with pytest.raises(TypeError, match="pairs of a class or a module and a name"):
        check_engine(Modelled, vocab_size=VOCAB_SIZE, fail_in=[Model.static])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]


def test_held_must_be_a_function() -> None:
    """What can't be called can't say what an engine holds."""
    with pytest.raises(TypeError, match="held must be a function, got 'int'"):
        check_engine(TinyEngine, vocab_size=VOCAB_SIZE, held=cast("Any", 7))


def test_held_is_told() -> None:
    """What an engine still holds when all sessions are closed is said, with what it was."""
    text = message(StaticCacheNotGivenBack, "tokens_reach_the_session")
    assert "Expected:  held(engine) to be 0, as it was before the first session" in text


def test_held_may_need_the_collector() -> None:
    """What is held by garbage in cycles is held no more."""

    class Cyclic(TinyEngine):
        def __init__(self) -> None:
            super().__init__()
            self.live: WeakSet[Cache] = WeakSet()

        def make_slots(self) -> StateSlots[Any]:
            return StateSlots(create=self.create, length=self.length, truncate=self.truncate)

        def create(self) -> Cache:
            cache = Cache(([], []))
            cycle: list[object] = [cache]
            cycle.append(cycle)
            self.live.add(cache)
            return cache

    check_engine(
        Cyclic,
        vocab_size=VOCAB_SIZE,
        held=lambda engine: len(engine.live),
        only=["decode_from_the_cache"],
    )


def test_longest_history_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A run says how long its longest history was: close to what it was given."""
    for most in 32, 64, 200:
        check_engine(
            TinyEngine, vocab_size=VOCAB_SIZE, max_tokens=most, only=["decode_from_the_cache"]
        )
        said = re.findall(r"The longest history had (\d+) tokens", capsys.readouterr().out)
        assert most - 12 <= int(said[0]) <= most
    with pytest.raises(ValueError, match="max_tokens must be at least 32, got 31"):
        check_engine(TinyEngine, vocab_size=VOCAB_SIZE, max_tokens=31)


def test_shortest_room_is_enough() -> None:
    """Every check gets by with the fewest tokens that may be asked for."""
    check_engine(Paged, vocab_size=VOCAB_SIZE, max_tokens=32, **Paged.options)


# What it leaves behind


def test_others_are_left_alone() -> None:
    """Sessions that a check doesn't know go on meanwhile, in other threads, and no fault strikes them."""
    engine, stop, errors = TinyEngine(), Event(), list[BaseException]()

    def serve() -> None:
        while not stop.wait(0.001):  # so that the check gets its share of the GIL
            try:
                with Session() as session:
                    engine.prefill(session, [1, 2, 3, 4, 5])
                    assert engine.decode(session).token == expected
            except BaseException as error:  # noqa: BLE001 that none comes is the point
                errors.append(error)

    with Session() as session:
        engine.prefill(session, [1, 2, 3, 4, 5])
        expected = engine.decode(session).token
    thread = Thread(target=serve)
    thread.start()
    try:
        check_engine(TinyEngine, vocab_size=VOCAB_SIZE, only=["failure_before_advance"])
    finally:
        stop.set()
        thread.join()
    assert not errors


def test_no_more_than_promised() -> None:
    """An engine is asked for no more than 8 sessions at a time, with no more than 64 tokens each."""
    most = {"sessions": 0, "tokens": 0}

    class Counting(TinyEngine):
        def __init__(self) -> None:
            super().__init__()
            self.live = 0

        def create(self) -> object:
            self.live += 1
            most["sessions"] = max(most["sessions"], self.live)
            return super().create()

        def release(self, cache: object) -> None:
            self.live -= 1

        def sample(self, session: Session, state: BorrowedState[object], out: int) -> int:
            most["tokens"] = max(most["tokens"], len(state.token_history) + 1)
            return super().sample(session, state, out)

    for seed in range(2):
        check_engine(Counting, vocab_size=VOCAB_SIZE, max_examples=8, seed=seed)
    assert 3 <= most["sessions"] <= 8
    assert 20 <= most["tokens"] <= 64


# What the documentation says


def test_page_lists_the_checks() -> None:
    """The page has the checks in their order, each with its promise."""
    listed = re.findall(r"^`(\w+)`\n: (.+)$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert listed == [(check.name, check.promise) for check in CHECKS.values()]


def test_page_shows_a_failure() -> None:
    """The failure on the page is a real one."""
    text = message(DecodeReturnsTheLast, "tokens_reach_the_session")
    assert f"```text\n{text}\n```" in PAGE.read_text("utf-8")


def test_page_tells_the_catch_rate() -> None:
    """The page has the numbers that the tests of the kit show."""
    text = " ".join(PAGE.read_text("utf-8").split())
    pairs = sum(map(len, BROKEN.values()))
    assert f"{len(BROKEN)} of {len(BROKEN)} broken engines" in text
    assert f"all {pairs} expected" in text
    assert f"{len(RIGHT)} right engines" in text
    assert f"no false alarm in {len(RIGHT) * len(SEEDS)} runs" in text
