"""The reference: an engine's answers in fresh sessions."""

from collections.abc import Callable, Sequence
from uuid import UUID

from attrs import define, field

from inference_session import Session
from inference_session.engine import Engine
from inference_session.testing._report import BrokenError


@define(eq=False)
class Reference:
    """Next tokens, computed in fresh sessions, from scratch.

    One engine computes them, one session at a time, and they are remembered. If its earlier sessions turn out to affect
    its answers, a new engine computes each token.
    """

    make_engine: Callable[[], Engine]
    swayed: BrokenError | None = field(init=False, default=None)
    """The broken promise of an engine that doesn't answer as a new one does."""
    _engine: Engine | None = field(init=False, default=None)
    _known: dict[tuple[UUID, tuple[int, ...]], int] = field(
        init=False, factory=dict[tuple[UUID, tuple[int, ...]], int]
    )

    def next_token(self, session_id: UUID, history: Sequence[int]) -> int:
        """Return the token after this history, in a session with this id."""
        key = session_id, tuple(history)
        if key not in self._known:
            if self._engine is None or self.swayed is not None:
                self._engine = self.make_engine()
            self._known[key] = next_token(self._engine, session_id, history)
        return self._known[key]

    def next_token_for_sure(self, session_id: UUID, history: Sequence[int]) -> int:
        """Return the same from an engine that has never served another session."""
        token = self.next_token(session_id, history)
        if self.swayed is not None:
            return token
        new = next_token(self.make_engine(), session_id, history)
        if new != token:
            self.swayed = BrokenError(
                f"token {new} after the tokens {list(history)}, as of a new engine",
                f"{token}",
                [
                    "engine = make_engine()",
                    f"# {len(self._known) - 1} sessions, one at a time: prefill, decode, close",
                    f'a = Session.with_id(UUID("{session_id}"))',
                    f"engine.prefill(a, {list(history)})",
                    f"engine.decode(a)  # -> {token}, expected {new}",
                ],
            )
            self._known = {(session_id, tuple(history)): new}
        return new


def next_token(engine: Engine, session_id: UUID, history: Sequence[int]) -> int:
    """Prefill a new session, and decode a token."""
    with Session.with_id(session_id) as session:
        engine.prefill(session, list(history))
        return engine.decode(session).token
