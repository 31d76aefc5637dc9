"""What type checkers take for an engine."""

from collections.abc import Sequence
from typing import assert_type

from inference_session import Session
from inference_session.engine import BatchEngine, DecodeResult, Engine, PrefillResult, StateSlots


def test_engine_needs_no_base_class() -> None:
    """A class is an engine by what it does, not by its base."""

    class Echo:
        def __init__(self) -> None:
            self._slots = StateSlots(create=list[int], length=len)

        def prefill(self, session: Session, tokens: Sequence[int]) -> PrefillResult:
            with self._slots.borrow(session) as state:
                state.append(tokens)
                state.kv_cache.extend(state.pending)
                state.advance(len(tokens))
                return PrefillResult(tokens_processed=len(tokens))

        def decode(self, session: Session) -> DecodeResult:
            with self._slots.borrow(session) as state:
                token = state.token_history[-1]
                state.append([token])
                return DecodeResult(token=token)

    engine: Engine = Echo()
    assert_type(engine.decode(Session()), DecodeResult)


def test_engine_may_do_more() -> None:
    """An engine may take more than it must, under names of its own, and have more methods."""

    class Generous:
        def prefill(
            self, chat: object, prompt: Sequence[int], /, *, chunk: int = 512
        ) -> PrefillResult:
            return PrefillResult(len(prompt))

        def decode(self, chat: Session, temperature: float = 0.0) -> DecodeResult:
            return DecodeResult(7)

        def encode(self, text: str) -> list[int]:
            return list(text.encode())

    engine: Engine = Generous()
    assert_type(engine.decode(Session()), DecodeResult)


def test_results_are_typed(engine: Engine, session: Session) -> None:
    """An application knows what it gets."""
    assert_type(engine.prefill(session, [1, 2, 3]), PrefillResult)
    assert_type(engine.prefill(session, (1, 2, 3)).tokens_processed, int)
    assert_type(engine.decode(session), DecodeResult)
    assert_type(engine.decode(session).token, int)


def test_engine_of_batches(
    engine: BatchEngine, plain: Engine, sessions: list[Session]
) -> list[Engine]:
    """An engine of batches is an engine; an engine that has none isn't one of batches."""
    assert_type(engine.decode_batch(sessions), Sequence[DecodeResult])
    assert_type(engine.decode_batch(())[0].token, int)

    class Lists:
        def prefill(self, session: Session, tokens: Sequence[int]) -> PrefillResult:
            return PrefillResult(len(tokens))

        def decode(self, session: Session) -> DecodeResult:
            return DecodeResult(7)

        def decode_batch(self, batch: Sequence[Session]) -> list[DecodeResult]:
            return [self.decode(session) for session in batch]

    batches: BatchEngine = Lists()
    batches = plain  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]  # ty: ignore[invalid-assignment]
    return [engine, batches]


def test_engine_that_does_less() -> list[Engine]:
    """A class that can't decode, or asks for more than it's given, or returns something else, is no engine."""

    class Mute:
        def prefill(self, session: Session, tokens: Sequence[int]) -> PrefillResult:
            return PrefillResult(len(tokens))

    class Demanding(Mute):
        def decode(self, session: Session, temperature: float) -> DecodeResult:
            return DecodeResult(7)

    class ById(Mute):
        def decode(self, session: str) -> DecodeResult:
            return DecodeResult(7)

    class Bare(Mute):
        def decode(self, session: Session) -> int:
            return 7

    class Asynchronous(Mute):
        async def decode(self, session: Session) -> DecodeResult:
            return DecodeResult(7)

    class OfLists:
        def prefill(self, session: Session, tokens: list[int]) -> PrefillResult:
            return PrefillResult(len(tokens))

        def decode(self, session: Session) -> DecodeResult:
            return DecodeResult(7)

    engine: Engine
    engine = Mute()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]  # ty: ignore[invalid-assignment]
    engines = [engine]
    engine = Demanding()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]  # ty: ignore[invalid-assignment]
    engines.append(engine)
    engine = ById()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]  # ty: ignore[invalid-assignment]
    engines.append(engine)
    engine = Bare()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]  # ty: ignore[invalid-assignment]
    engines.append(engine)
    engine = Asynchronous()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]  # ty: ignore[invalid-assignment]
    engines.append(engine)
    engine = OfLists()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]  # ty: ignore[invalid-assignment]
    return [*engines, engine]


def test_wrong_arguments(engine: Engine, session: Session) -> None:
    """An application passes a session and tokens, by position."""
    engine.prefill(session.id, [1])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    engine.prefill(session, "text")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    engine.prefill(session, 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    engine.prefill(session)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[missing-argument]
    engine.decode(session=session)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[positional-only-parameter-as-kwarg]


def test_results_are_frozen(prefilled: PrefillResult, decoded: DecodeResult) -> None:
    """Nobody changes what an engine said."""
    prefilled.tokens_processed = 0  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]
    decoded.token = 0  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]


def test_results_hold_ints() -> None:
    """An engine says a number."""
    PrefillResult([1, 2])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    DecodeResult("a")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    DecodeResult()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[missing-argument]
