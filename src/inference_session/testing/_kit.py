"""The kit: runs the checks, and reports the shortest sequence of calls found to break a promise."""

from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import Final
from unittest import SkipTest

import pytest
from attrs import define, field
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from inference_session.engine import Engine
from inference_session.testing._checks import CHECKS, Check
from inference_session.testing._choices import Choices
from inference_session.testing._hooks import hooked
from inference_session.testing._reference import Reference
from inference_session.testing._report import BrokenError, ConclusiveError, Report
from inference_session.testing._run import Run
from inference_session.testing._strength import weakness
from inference_session.testing._watch import Watch


MAX_EXAMPLES: Final = 20
HEALTH_CHECKS: Final = (
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.large_base_example,
    HealthCheck.too_slow,
)
SHRINKS: Final = 10
"""How many times `max_examples` are spent on shrinking a failure."""


class TooWeakError(AssertionError):
    """The engine broke no promise, but wouldn't have been caught if it had."""


def check_engine(
    make_engine: Callable[[], Engine],
    *,
    vocab_size: int,
    only: Collection[str] | None = None,
    skip: Mapping[str, str] | None = None,
    max_examples: int = MAX_EXAMPLES,
    seed: int = 0,
) -> None:
    """Check that an engine keeps the state of its sessions right.

    Args:
        make_engine: returns a new engine each time. They may share a model, as long as it keeps no state of a session.
            At most 8 sessions are open at a time in an engine, with at most 64 tokens each.
        vocab_size: tokens are ints from 0 to `vocab_size` - 1.
        only: names of the checks to run, if not all.
        skip: names of checks not to run, each with a reason.
        max_examples: how many sequences of calls each check tries.
        seed: the same seed tries the same calls.

    Raises:
        TypeError, ValueError: if an argument makes no sense; no check was run.
        AssertionError: if a promise is broken, or if the engine is too weak to prove otherwise. The message has the
            promise, the expected result, the shortest sequence of calls found to break it, and how to run it again.
        unittest.SkipTest: if nothing was checked: `skip` names all checks, or the others don't apply to the engine.
    """
    kit = new_kit(make_engine, vocab_size, max_examples, seed)
    too_weak: TooWeakError | None = None
    nothing: SkipTest | None = SkipTest("all checks are skipped")
    for check in selected(only, skip):
        if check.name not in (skip or {}):
            try:
                kit.run(check)
                nothing = None
            except SkipTest as reason:
                nothing = nothing and reason
            except TooWeakError as error:  # another check may still find it broken
                too_weak = too_weak or error
    unproven = too_weak or nothing
    if unproven is not None:
        raise unproven


def parametrize_with_checks(
    make_engine: Callable[[], Engine],
    *,
    vocab_size: int,
    only: Collection[str] | None = None,
    skip: Mapping[str, str] | None = None,
    max_examples: int = MAX_EXAMPLES,
    seed: int = 0,
) -> pytest.MarkDecorator:
    """Make each check of an engine a test of its own.

    The decorated test gets it as `check`, and calls it. Arguments are those of `check_engine`; skipped checks show as
    skipped tests, with their reason.
    """
    kit = new_kit(make_engine, vocab_size, max_examples, seed)
    reasons = skip or {}

    def bound(check: Check) -> Callable[[], None]:
        return lambda: kit.run(check)

    return pytest.mark.parametrize(
        "check",
        [
            pytest.param(
                bound(check),
                id=check.name,
                marks=[pytest.mark.skip(reason=reasons[check.name])]
                if check.name in reasons
                else [],
            )
            for check in selected(only, skip)
        ],
    )


def selected(only: Collection[str] | None, skip: Mapping[str, str] | None) -> list[Check]:
    """Return the checks to be run, in their order.

    Raises:
        TypeError: if `only` or `skip` has the wrong type.
        ValueError: if a name isn't a check's, or no check is left.
    """
    if isinstance(only, str):
        raise TypeError(f"only must be a collection of names, got a single one: use [{only!r}]")
    if skip is not None and not isinstance(skip, Mapping):
        raise TypeError("skip must be a mapping from the name of a check to the reason")
    unknown = {*(only or ()), *(skip or ())} - CHECKS.keys()
    if unknown:
        raise ValueError(
            f"no check is called {', '.join(map(repr, sorted(unknown)))}; the checks are {', '.join(CHECKS)}"
        )
    checks = [check for check in CHECKS.values() if only is None or check.name in only]
    if not checks:
        raise ValueError("only names no check, so nothing would be checked")
    return checks


def new_kit(
    make_engine: Callable[[], Engine], vocab_size: int, max_examples: int, seed: int
) -> "Kit":
    """Return a kit, if its arguments make sense.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a number is too low.
    """
    if not callable(make_engine):
        raise TypeError(
            f"make_engine must return a new engine each time, got {type(make_engine).__name__!r}"
        )
    lowest = {"vocab_size": (vocab_size, 2), "max_examples": (max_examples, 1), "seed": (seed, 0)}
    for name, (number, least) in lowest.items():
        if type(number) is not int:
            raise TypeError(f"{name} must be an int, got {type(number).__name__!r}")
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    return Kit(make_engine, vocab_size, max_examples, seed)


@define(eq=False, slots=False)
class Kit:
    """An engine to be checked, and how thoroughly."""

    make_engine: Callable[[], Engine]
    vocab_size: int
    max_examples: int
    seed: int
    _watch: Watch = field(init=False, factory=Watch)

    def run(self, check: Check) -> None:
        """Run a check."""
        __tracebackhide__ = True
        if not self._makes_new:
            raise ValueError("make_engine must return a new engine each time, got the same twice")
        with hooked(self._watch):
            search = Search(self, check, self._watch)
            search.run()
        if search.best is not None:
            raise AssertionError(str(self._report(check, search))) from search.best.__cause__
        if self._weakness is not None:
            raise TooWeakError(
                f"{check.name}: this engine is too weak to check, so nothing is proven: {self._weakness}.\n"
                "Use a model whose next token depends on all tokens: with random weights, large enough ones."
            )
        if check.vacuous and not search.proofs:
            raise SkipTest(check.vacuous)

    @cached_property
    def _makes_new(self) -> bool:
        return self.make_engine() is not self.make_engine()

    @cached_property
    def _weakness(self) -> str | None:
        try:
            return weakness(self.make_engine, self.vocab_size)
        except Exception as error:  # noqa: BLE001 engines may raise anything
            return f"a simple prefill and decode raised {type(error).__name__}: {error}"

    def _report(self, check: Check, search: "Search") -> Report:
        assert search.best is not None
        again = (
            f'check_engine(make_engine, vocab_size={self.vocab_size}, only=["{check.name}"], '
            f"max_examples={self.max_examples}, seed={self.seed})\n"
            f"pytest -k {check.name}"
        )
        return Report(check.name, check.promise, search.best, again, search.remark)


@define(eq=False)
class Search:
    """The search for the shortest sequence of calls that breaks a promise."""

    kit: Kit
    check: Check
    watch: Watch
    best: BrokenError | None = field(init=False, default=None)
    remark: str = field(init=False, default="")
    proofs: int = field(init=False, default=0)
    _tries: int = field(init=False, default=0)

    def run(self) -> None:
        """Try sequences of calls; once one breaks the promise, try shorter ones."""
        reference = Reference(self.kit.make_engine)

        @seeded(self.kit.seed)
        @settings(
            max_examples=self.kit.max_examples,
            database=None,
            deadline=None,
            derandomize=False,
            phases=[Phase.generate, Phase.shrink],
            report_multiple_bugs=False,
            suppress_health_check=HEALTH_CHECKS,
            verbosity=Verbosity.quiet,
        )
        @given(st.data())
        def examine(data: st.DataObject) -> None:
            self._count()
            choices = Choices(data, self.kit.vocab_size)
            try:
                with Run(self.kit.make_engine, self.watch, reference, choices) as run:
                    self.check.run(run)
                    self.proofs += run.proofs
            except BrokenError as broken:
                self._found(broken)
                raise

        try:
            examine()
        except ConclusiveError as conclusive:
            self.best = conclusive.broken
        except Flaky:
            self.remark = (
                "The engine doesn't always answer alike: the same calls didn't show it again."
            )
        except BrokenError:
            pass
        self.best = self.best or reference.swayed

    def _found(self, broken: BrokenError) -> None:
        if self.best is None or broken.size < self.best.size:
            self.best = broken

    def _count(self) -> None:
        if self.best is not None:
            self._tries += 1
            if self._tries > SHRINKS * self.kit.max_examples:
                raise ConclusiveError(self.best)
