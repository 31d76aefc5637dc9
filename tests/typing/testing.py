"""What type checkers know of the conformance kit."""

from collections.abc import Callable, Sequence
from typing import assert_type

from inference_session import Session
from inference_session.engine import DecodeResult, Engine, PrefillResult
from inference_session.testing import check_engine, parametrize_with_checks


def test_engines_are_made(make_engine: Callable[[], Engine]) -> None:
    """The kit takes whatever makes an engine, and is told the rest by name."""
    check_engine(make_engine, vocab_size=8)
    check_engine(make_engine, vocab_size=8, only={"a"}, skip={"b": "why"}, max_examples=1, seed=2)
    check_engine(make_engine, vocab_size=8, only=["a"], max_tokens=100, fail_in=[(str, "upper")])


class Pool:
    """An engine with something to count."""

    used = 0

    def prefill(self, session: Session, tokens: Sequence[int]) -> PrefillResult:
        """Add tokens."""
        return PrefillResult(len(tokens))

    def decode(self, session: Session) -> DecodeResult:
        """Add the next one."""
        return DecodeResult(7)


def test_engine_is_asked_what_it_holds() -> None:
    """The function gets the engine, with its own type."""
    check_engine(Pool, vocab_size=8, held=lambda engine: engine.used)
    parametrize_with_checks(Pool, vocab_size=8, held=lambda engine: assert_type(engine, Pool).used)


def test_checks_become_tests(make_engine: Callable[[], Engine]) -> None:
    """The decorator leaves a test as typed as it was."""

    @parametrize_with_checks(make_engine, vocab_size=8)
    def test(check: Callable[[], None]) -> None:
        check()

    test(print)
    test(7)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]


def test_wrong_arguments(engine: Engine, make_engine: Callable[[], Engine]) -> None:
    """An engine that was made already, or something else, is refused; so is skipping without a why."""
    check_engine(engine, vocab_size=8)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    check_engine(Session, vocab_size=8)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    check_engine(make_engine)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[missing-argument]
    check_engine(make_engine, 8)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[missing-argument, too-many-positional-arguments]
    check_engine(make_engine, vocab_size=8, skip=["a"])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    check_engine(make_engine, vocab_size=8, fail_in=["forward"])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    check_engine(make_engine, vocab_size=8, held=7)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    parametrize_with_checks(make_engine)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[missing-argument]
