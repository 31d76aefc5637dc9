"""An observer of a session may have a borrow use other functions and another lease than the engine's."""

from collections.abc import Callable
from typing import Any

from attrs import define, field

from inference_session import Session
from inference_session._session import CacheFunctions
from inference_session.engine import StateSlots


@define(eq=False)
class Counting:
    """Counts the looks at the lease, and has the KV cache come from elsewhere."""

    other: StateSlots[list[int]]
    looks: int = field(init=False, default=0)

    def borrowing(
        self, slots: CacheFunctions[Any], lease: Callable[[], object]
    ) -> tuple[CacheFunctions[Any], Callable[[], object]]:
        """Return other functions, and a lease that counts."""

        def counting() -> object:
            self.looks += 1
            return lease()

        return self.other, counting

    def committing(self, session: Session) -> None:
        """Do nothing."""

    def rolled_back(self, session: Session, failure: BaseException | None) -> None:
        """Do nothing."""

    def settled(self, session: Session) -> None:
        """Do nothing."""

    def close(self, session: Session) -> None:
        """Close it."""
        session._closed = True


def test_observer_sees_each_use_of_the_state() -> None:
    """Each member looks at the lease given by the observer, and the functions given by it are called, every time."""
    made: list[list[int]] = []

    def create() -> list[int]:
        made.append([])
        return made[-1]

    engine = StateSlots(create=list[int], length=len)
    observer = Counting(StateSlots(create=create, length=len))
    session = Session()
    session._observer = observer
    for count in (1, 2):
        with engine.borrow(session) as state:
            looks = observer.looks
            state.append([7])
            state.kv_cache.append(7)
            state.advance(1)
            assert len(state.pending) == 0
            assert observer.looks >= looks + 4
        assert session.token_count == count
    assert made == [[7, 7]]
    with engine.borrow_all([session]) as (state,):
        assert state.kv_cache is made[0]
    assert not session.borrowed
    session.close()
    assert session.closed
