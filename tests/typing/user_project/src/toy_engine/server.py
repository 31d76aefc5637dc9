"""Many chats by their ids, and what each error becomes."""

from collections.abc import Iterator, Sequence
from uuid import UUID

from inference_session import Session, SessionRegistry
from inference_session.engine import Engine
from inference_session.exceptions import (
    RegistryFullError,
    SessionBusyError,
    SessionError,
    SessionNotFoundError,
)


class Server:
    """Serves chats through any engine; it knows nothing of KV caches."""

    def __init__(self, engine: Engine, *, max_sessions: int = 100) -> None:
        self._engine = engine
        self._registry = SessionRegistry(max_sessions=max_sessions, idle_timeout=600.0)

    def start(self, prompt: Sequence[int]) -> UUID:
        """Begin a chat, and return its id."""
        session = self._registry.open()
        self._engine.prefill(session, prompt)
        return session.id

    def stream(self, chat: UUID, count: int) -> Iterator[int]:
        """Go on with a chat."""
        session: Session = self._registry[chat]
        for _ in range(count):
            yield self._engine.decode(session).token

    def status(self, error: Exception) -> int:
        """Say an error by a status of HTTP."""
        match error:
            case SessionBusyError(session_id=chat):
                return 409 if chat in self._registry else 410
            case SessionNotFoundError():
                return 404
            case RegistryFullError():
                return 503
            case SessionError():
                return 500
            case _:
                return 422

    def close(self) -> None:
        """End all chats."""
        self._registry.close()
