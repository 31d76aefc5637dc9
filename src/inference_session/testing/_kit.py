"""The kit: runs the checks, and reports the shortest sequence of calls found to break a promise."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, cached_property
from textwrap import indent
from time import monotonic
from types import ModuleType
from typing import Any, Final, TypeVar
from unittest import SkipTest

import pytest
from attrs import define, field
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from inference_session import Session
from inference_session._session import NO_CACHE
from inference_session.engine import Engine
from inference_session.testing._checks import CHECKS, Check
from inference_session.testing._choices import Choices, text
from inference_session.testing._observer import Part, Watch
from inference_session.testing._scenario import (
    Answers,
    BrokenError,
    ConclusiveError,
    Reference,
    Scenario,
    told,
)


E = TypeVar("E", bound=Engine)

MAX_EXAMPLES: Final = 16
LEAST_TOKENS: Final = 32
HEALTH_CHECKS: Final = (
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.large_base_example,
    HealthCheck.too_slow,
)
SHRINKS: Final = 10
"""How many times `max_examples` are spent on shortening what was found, at most."""
SHRINK_SECONDS: Final = 30.0
"""How many seconds are spent on it, at most, give or take one try."""


class UnprovenError(AssertionError):
    """The engine broke no promise in this check, but nobody knows whether it would have been caught."""


def check_engine(
    make_engine: Callable[[], E],
    *,
    vocab_size: int,
    max_tokens: int = 64,
    held: Callable[[E], int] | None = None,
    fail_in: Iterable[tuple[object, str]] = (),
    only: Collection[str] | None = None,
    skip: Mapping[str, str] | None = None,
    max_examples: int = MAX_EXAMPLES,
    seed: int = 0,
) -> None:
    """Check that an engine keeps the state of its sessions right, and print how long its longest history was.

    Args:
        make_engine: returns a new engine each time. They may share a model, as long as it keeps no state of a session.
            At most 8 sessions are open at a time in an engine, with at most `max_tokens` tokens each.
        vocab_size: tokens are ints from 0 to `vocab_size` - 1.
        max_tokens: the most tokens in a session. Prompts come close to it, and to multiples of powers of two. Choose it
            beyond the lengths at which your engine does something else: a block, a window, a change of position
            encoding.
        held: returns how much of something an engine holds for its sessions, such as blocks of a pool. Once all
            sessions are closed, this must be what it was before the first.
        fail_in: what is made to fail inside the model: pairs of a class or a module and the name of something callable
            in it, such as `(Layer, "forward")`. It raises before it does its work, or after. Nothing else should use it
            meanwhile.
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
    kit = Kit(make_engine, vocab_size, max_tokens, held, fail_in, max_examples, seed)
    unproven: UnprovenError | None = None
    nothing: SkipTest | None = SkipTest("all checks are skipped")
    for check in selected(only, skip):
        if check.name not in (skip or {}):
            try:
                kit.run(check)
                nothing = None
            except SkipTest as reason:
                nothing = nothing and reason
            except UnprovenError as error:  # another check may still find it broken
                unproven = unproven or error
    missing = unproven or nothing
    if missing is not None:
        raise missing
    print(f"The engine passes. {kit.longest_history}")  # noqa: T201


def parametrize_with_checks(
    make_engine: Callable[[], E],
    *,
    vocab_size: int,
    max_tokens: int = 64,
    held: Callable[[E], int] | None = None,
    fail_in: Iterable[tuple[object, str]] = (),
    only: Collection[str] | None = None,
    skip: Mapping[str, str] | None = None,
    max_examples: int = MAX_EXAMPLES,
    seed: int = 0,
) -> pytest.MarkDecorator:
    """Make each check of an engine a test of its own.

    The decorated test gets it as `check`, and calls it. Arguments are those of `check_engine`; skipped checks show as
    skipped tests, with their reason. If the engine doesn't run at all, or is too weak, one test fails, and the others
    are skipped.
    """
    kit = Kit(make_engine, vocab_size, max_tokens, held, fail_in, max_examples, seed)
    reasons = skip or {}

    def bound(check: Check) -> Callable[[], None]:
        def run() -> None:
            kit.run(check)
            print(kit.longest_history)  # noqa: T201 shown by `pytest -rP`

        return run

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


def checked_parts(fail_in: Iterable[Any]) -> list[Part]:
    """Return the parts of a model, if they can be made to fail.

    Raises:
        TypeError: if one isn't a class or a module, and a name.
        ValueError: if it has no such callable.
    """
    parts = list(fail_in)
    for part in parts:
        match part:
            case (type() | ModuleType() as owner, str(name)) if callable(
                getattr(owner, name, None)
            ):
                pass
            case (type() | ModuleType() as owner, str(name)):
                raise ValueError(f"fail_in: {owner.__name__!r} has no callable {name!r}")
            case _:
                raise TypeError(
                    "fail_in must consist of pairs of a class or a module and a name, "
                    f'such as (Layer, "forward"), got {part!r}'
                )
    return parts


@define(eq=False, slots=False)
class Kit:
    """An engine to be checked, and how thoroughly."""

    make_engine: Callable[[], Any]
    vocab_size: int
    max_tokens: int
    held: Callable[[Any], int] | None
    fail_in: Sequence[Part] = field(converter=checked_parts)
    max_examples: int
    seed: int
    shrink_seconds: float = SHRINK_SECONDS
    answers: Answers = field(init=False, factory=Answers)
    """Next tokens as of fresh sessions: what one check has asked for needn't be computed for another."""
    longest: int = field(init=False, default=0)
    _runs: bool = field(init=False, default=False)
    """Whether the first check has passed."""
    _unfit: str = field(init=False, default="")
    """Why no check can pass, once that was told."""

    def __attrs_post_init__(self) -> None:
        for name, function in (("make_engine", self.make_engine), ("held", self.held)):
            if not callable(function) and (name == "make_engine" or function is not None):
                wanted = (
                    "return a new engine each time" if name == "make_engine" else "be a function"
                )
                raise TypeError(f"{name} must {wanted}, got {type(function).__name__!r}")
        lowest = {"vocab_size": 2, "max_tokens": LEAST_TOKENS, "max_examples": 1, "seed": 0}
        for name, least in lowest.items():
            number: object = getattr(self, name)
            if type(number) is not int:
                raise TypeError(f"{name} must be an int, got {type(number).__name__!r}")
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")

    def run(self, check: Check) -> None:
        """Run a check."""
        __tracebackhide__ = True
        if not self._makes_new:
            raise ValueError("make_engine must return a new engine each time, got the same twice")
        first = CHECKS["engine_runs"]
        if check is not first:
            if self._unfit == NOT_RUNNING:
                raise SkipTest(f"{self._unfit}, as another test shows")
            if not self._runs:
                self._search(first)
        proofs = self._search(check)
        self._require_strength(check)
        if check.vacuous and not proofs:
            raise SkipTest(check.vacuous)

    @property
    def longest_history(self) -> str:
        """How long the longest history was, so far."""
        return f"The longest history had {self.longest} tokens."

    def _search(self, check: Check) -> int:
        """Search for calls that break a check's promise, and return how often its subject has happened."""
        __tracebackhide__ = True
        search = Search(self, check)
        search.run()
        self.longest = max(self.longest, search.longest)
        if search.best is not None:
            if check.name == "engine_runs":
                self._unfit = NOT_RUNNING
            raise self._failure(check, search.best, search.remark) from search.best.__cause__
        self._runs = True
        return search.proofs

    def _require_strength(self, check: Check) -> None:
        """Raise an error if the engine is too weak to check; after the first time, skip the check."""
        __tracebackhide__ = True
        if isinstance(self._weakness, BrokenError):
            failure = self._failure(CHECKS["engine_runs"], self._weakness)
            raise UnprovenError(str(failure)) from self._weakness.__cause__
        if self._weakness is None:
            return
        if self._unfit and check.name != "engine_runs":
            raise SkipTest(f"{self._unfit}, as another test shows")
        self._unfit = TOO_WEAK
        raise UnprovenError(
            f"{check.name}: {TOO_WEAK}, so nothing is proven: {self._weakness}.\n"
            "Either the model's answers hardly depend on the prompt: with random weights, use larger ones, and untie "
            "the embeddings.\n"
            "Or the KV cache of the session is not what the model is given: it computes from the tokens alone, or from "
            "a cache of its own."
        )

    @cached_property
    def _makes_new(self) -> bool:
        return self.make_engine() is not self.make_engine()

    @cached_property
    def _weakness(self) -> str | BrokenError | None:
        try:
            return weakness(self.make_engine(), self.vocab_size)
        except Exception as error:  # noqa: BLE001 engines may raise anything
            calls = ["engine = make_engine()", "# prefill and decode two sessions in turns"]
            broken = BrokenError("no error", told(error), calls)
            broken.__cause__ = error
            return broken

    def _failure(self, check: Check, broken: BrokenError, remark: str = "") -> AssertionError:
        """Return the error for an engine developer."""
        options = {"vocab_size": self.vocab_size, "max_tokens": self.max_tokens}
        again = ", ".join(
            [
                "make_engine",
                *(f"{name}={value}" for name, value in options.items()),
                f'only=["{check.name}"]',
                f"max_examples={self.max_examples}",
                f"seed={self.seed}",
            ]
        )
        parts = [
            f"{check.name}: the engine breaks a promise.",
            f"Promise:   {check.promise}",
            f"Expected:  {broken.expected}",
            f"Got:       {broken.got}",
            "Shortest sequence of calls found that shows it:",
            indent("\n".join(broken.calls), "    "),
            *([remark] if remark else []),
            "To run it again:",
            f"    check_engine({again})",
            f"    pytest -k {check.name}",
        ]
        return AssertionError("\n".join(parts))


NOT_RUNNING: Final = "this engine doesn't run at all"
TOO_WEAK: Final = "this engine is too weak to check"


@define(eq=False)
class Search:
    """The search for the shortest sequence of calls that breaks a promise."""

    kit: Kit
    check: Check
    best: BrokenError | None = field(init=False, default=None)
    remark: str = field(init=False, default="")
    proofs: int = field(init=False, default=0)
    longest: int = field(init=False, default=0)
    _tries: int = field(init=False, default=0)
    _deadline: float = field(init=False, default=0.0)

    def run(self) -> None:
        """Try sequences of calls; once one breaks the promise, try shorter ones."""
        kit, watch = self.kit, Watch()
        reference = Reference(kit.make_engine, kit.answers)

        @seeded(kit.seed)
        @settings(
            max_examples=max(kit.max_examples // (4 if self.check.simple else 1), 1),
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
            choices = Choices(data, kit.vocab_size, kit.max_tokens)
            scenario = Scenario(kit.make_engine, kit.held, kit.fail_in, watch, reference, choices)
            try:
                with scenario as run:
                    self.check.run(run)
                    self.proofs += run.proofs
            except BrokenError as broken:
                self._found(broken)
                raise
            finally:
                self.longest = max(self.longest, scenario.longest)

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
        if self.best is None:
            self._deadline = monotonic() + self.kit.shrink_seconds
        if self.best is None or broken.size < self.best.size:
            self.best = broken

    def _count(self) -> None:
        """Count a try, and give up shortening what was found when that takes too long."""
        if self.best is not None:
            self._tries += 1
            if self._tries > SHRINKS * self.kit.max_examples or monotonic() > self._deadline:
                raise ConclusiveError(self.best)


# The strength of an engine: a mistake shows only if some output depends on it.

TRIALS: Final = 16
LENGTH: Final = 8
ENOUGH: Final = 2
"""In how many trials a change of the input, or of the KV cache, must change the output."""


def weakness(engine: Engine, vocab_size: int) -> str | None:
    """Return why an engine is too weak to check, if it is."""
    prompts = [text(-1 - trial, LENGTH, vocab_size) for trial in range(TRIALS)]

    @cache
    def answer(*prompt: int) -> int:
        with Session() as session:
            engine.prefill(session, list(prompt))
            return engine.decode(session).token

    for part, change in CHANGES.items():
        pairs = ((answer(*it), answer(*change(it, vocab_size))) for it in prompts)
        if not differ(pairs):
            if len({answer(*it) for it in prompts}) == 1:
                return "it answers every prompt with the same token"
            return f"its answers hardly depend on {part}"
    swapped = (
        (
            answers_of_two(engine, one, other, swap=False),
            answers_of_two(engine, one, other, swap=True),
        )
        for one, other in zip(prompts[::2], prompts[1::2], strict=True)
    )
    if not differ((left, right) for both in swapped for left, right in zip(*both, strict=True)):
        return "its answers hardly depend on the KV cache that the session holds"
    return None


def differ(pairs: Iterable[tuple[int, int]]) -> bool:
    """Whether answers differ often enough; as soon as they do, no more are asked for."""
    found = 0
    for left, right in pairs:
        found += left != right
        if found == ENOUGH:
            return True
    return False


def last_changed(prompt: Sequence[int], vocab_size: int) -> list[int]:
    """Return a prompt with another last token."""
    return [*prompt[:-1], another(prompt[-1], vocab_size)]


def first_changed(prompt: Sequence[int], vocab_size: int) -> list[int]:
    """Return a prompt with another first token."""
    return [another(prompt[0], vocab_size), *prompt[1:]]


def another(token: int, vocab_size: int) -> int:
    """Return another token."""
    return (token + (vocab_size + 1) // 2) % vocab_size


def reordered(prompt: Sequence[int], vocab_size: int) -> list[int]:
    """Return a prompt with its tokens, all but the last, in another order."""
    return [*reversed(prompt[:-1]), prompt[-1]]


CHANGES: Final[dict[str, Callable[[Sequence[int], int], list[int]]]] = {
    "the last token of the prompt": last_changed,
    "the first token of the prompt": first_changed,
    "the order of the tokens": reordered,
}


def answers_of_two(
    engine: Engine, prompt: Sequence[int], other_prompt: Sequence[int], *, swap: bool
) -> list[int]:
    """Return the second tokens decoded after two prompts; for these, each session may get the other's KV cache."""
    with Session() as one, Session() as other:
        for session, tokens in ((one, prompt), (other, other_prompt)):
            engine.prefill(session, list(tokens))
            engine.decode(session)
        if not swap:
            return [engine.decode(session).token for session in (one, other)]
        if one._kv_cache is not NO_CACHE and other._kv_cache is not NO_CACHE:
            one._kv_cache, other._kv_cache = other._kv_cache, one._kv_cache
        return [decoded(engine, session) for session in (one, other)]


def decoded(engine: Engine, session: Session) -> int:
    """Return the next token; -1 if the engine notices the change."""
    try:
        return engine.decode(session).token
    except Exception:  # noqa: BLE001 so it depends on the KV cache
        return -1
