"""The reference: what an engine answers when nothing went before."""

from collections.abc import Callable, Sequence
from uuid import UUID

from attrs import define, field

from inference_session import Session
from inference_session.engine import Engine


@define(eq=False)
class Reference:
    """Next tokens, computed in fresh sessions, from scratch.

    They are computed on one engine, which serves one session at a time, and remembered. Where that one can't be
    relied upon, a new engine tells.
    """

    make_engine: Callable[[], Engine]
    _engine: Engine | None = field(init=False, default=None)
    _known: dict[tuple[UUID, tuple[int, ...]], int] = field(
        init=False, factory=dict[tuple[UUID, tuple[int, ...]], int]
    )

    def next_token(self, session_id: UUID, history: Sequence[int]) -> int:
        """Return the token that follows on these in a session with this id."""
        key = session_id, tuple(history)
        if key not in self._known:
            if self._engine is None:
                self._engine = self.make_engine()
            self._known[key] = next_token(self._engine, session_id, history)
        return self._known[key]

    def next_token_of_new_engine(self, session_id: UUID, history: Sequence[int]) -> int:
        """Return the same, by an engine that has never served another session."""
        return next_token(self.make_engine(), session_id, history)


def next_token(engine: Engine, session_id: UUID, history: Sequence[int]) -> int:
    """Prefill a new session, and decode a token."""
    with Session.with_id(session_id) as session:
        engine.prefill(session, list(history))
        return engine.decode(session).token
