"""Everything that can be done with sessions, told so that it can be interrupted anywhere."""

import gc
from collections.abc import Callable, Generator
from functools import partial
from typing import Generic, TypeAlias, TypeVar

from tests.tracked_engines import END, FrozenCache, Functional, Mutable, MutableCache

from inference_session import Session
from inference_session.engine import BorrowedState, Slot, StateSlots


KV = TypeVar("KV")

COUNT = Slot(int)
"""The number of tokens: a further slot, never to be out of step with the history."""


def set_count(state: BorrowedState[KV]) -> None:
    """Set the further slot to the number of tokens."""
    state[COUNT] = len(state.token_history)


class FaultError(Exception):
    """An error in a step of an engine."""


class Story(Generic[KV]):
    """Every operation on two sessions, step by step, and the invariants at every instant."""

    # The histories of both sessions after each step.
    HISTORIES: tuple[tuple[list[int], list[int]], ...] = (
        ([], []),
        ([1, 2, 3], []),
        ([1, 2, 3, 4, 5], []),
        ([1, 2, 9], []),
        ([1, 2, 9], []),
        ([1, 2, 7, 8, 7], []),
        ([1, 2, 7, 8, 7], []),
        ([1, 2, 7, 8, 7, 6], [6]),
        ([1, 2, 7, 8, 7, 6], [6]),
        ([1, 2, 7], [6]),
    )

    def __init__(
        self,
        slots: StateSlots[KV],
        feed: Callable[[BorrowedState[KV], int], None],
        tokens: Callable[[KV], list[int]],
        check_books: Callable[[], None],
    ) -> None:
        self.slots = slots
        self.feed = feed
        self.tokens = tokens
        self.check_books = check_books
        self.one = Session()
        self.other = Session()
        self.step = 0

    def run(self) -> None:  # noqa: PLR0915 one step after the other
        """Do everything with both sessions."""
        slots, feed, one, other = self.slots, self.feed, self.one, self.other
        with slots.borrow(one) as state:
            state.append([1, 2, 3])
            feed(state, 2)
            set_count(state)
        self.step = 1
        with slots.borrow(one) as state:
            feed(state, 1)
            state.append([4, 5])
            set_count(state)
            state.commit()
            self.step = 2
            feed(state, 2)
            state.rewind(2, pending=0)
            state.append([9])
            feed(state, 1)
            set_count(state)
        self.step = 3
        try:
            with slots.borrow(one) as state:
                state.append([5])
                feed(state, 1)
                state.rewind(1)
                state.append([8, 8])
                feed(state, 2)
                set_count(state)
                raise FaultError  # noqa: TRY301
        except FaultError:
            self.step = 4
        with slots.borrow(one) as state:
            state.reuse_prefix([1, 2, 7, 8, 7])
            for part in state.chunks(2, keep=0):
                feed(state, len(part))
            set_count(state)
        self.step = 5
        slots.evict(one)
        self.step = 6
        with slots.borrow_all([one, other]) as states:
            for state in states:
                state.append([6])
                feed(state, len(state.pending))
                set_count(state)
        self.step = 7
        try:
            with slots.borrow_all([one, other]) as states:
                for state in states:
                    state.append([5])
                    feed(state, 1)
                raise FaultError  # noqa: TRY301
        except FaultError:
            self.step = 8
        with slots.borrow(one, key="another") as state:
            state.rewind(3)
            set_count(state)
        self.step = 9
        one.close()
        other.close()

    def run_closing(self) -> None:
        """Close both sessions in mid-borrow."""
        slots, feed, one, other = self.slots, self.feed, self.one, self.other
        with slots.borrow(one) as state:
            state.append([1, 2, 3])
            feed(state, 3)
            set_count(state)
        with slots.borrow_all([one, other]) as states:
            for state in states:
                state.append([6])
                feed(state, 1)
                set_count(state)
                state.commit()
            other.close()
            states[1].append([5])
            feed(states[1], 1)
        with slots.borrow(one) as state:
            state.append([4, 4])
            feed(state, 1)
            set_count(state)
            state.commit()
            one.close()
            feed(state, 1)
            state.rewind(5, pending=0)
            state.append([9])
            feed(state, 1)
        self.step = 9

    def stream(self, sessions: list[Session]) -> Generator[None, None, None]:
        """Suspend in a block before it is committed."""
        with self.slots.borrow_all(sessions) as states:
            for state in states:
                state.append([5, 5])
                self.feed(state, 1)
                set_count(state)
            yield

    def run_collected(self) -> None:
        """Leave blocks to be ended by the garbage collector."""
        slots, feed, one, other = self.slots, self.feed, self.one, self.other
        with slots.borrow(one) as state:
            state.append([1, 2, 3])
            feed(state, 2)
            set_count(state)
        self.step = 1
        stream = self.stream([one])
        next(stream)
        cycle: list[object] = [stream]
        cycle[END:] = (cycle,)
        del stream, cycle
        gc.collect()
        with slots.borrow(one) as state:
            feed(state, 1)
            state.append([4, 5])
            set_count(state)
        self.step = 2
        stream = self.stream([one, other])
        next(stream)
        cycle = [stream]
        cycle[END:] = (cycle,)
        del stream, cycle
        other.close()
        gc.collect()
        one.close()
        self.step = 9

    def check(self) -> None:
        """Require both sessions to be free, and as after one of their commits."""
        histories = self.check_one(self.one), self.check_one(self.other)
        following = self.HISTORIES[min(self.step + 1, 9)]
        for session, history, last in zip(
            (0, 1), histories, self.HISTORIES[self.step], strict=True
        ):
            assert history in (None, last, following[session]), "torn"
        if None not in histories:
            assert histories in (self.HISTORIES[self.step], following), "torn between sessions"

    def check_one(self, session: Session) -> list[int] | None:
        """Require a session to be free and whole, and return its history."""
        total = session.token_count
        if session.closed:
            return None
        with self.slots.borrow(session) as state:
            history = [*state.token_history]
            assert total == len(history), "token_count is torn"
            assert state[COUNT] == total, "the further slot is torn"
            covered = state.kv_length
            if covered:
                assert self.tokens(state.kv_cache) == history[:covered], "ragged"
            self.feed(state, len(state.pending))
        with self.slots.borrow(session) as state:
            assert self.tokens(state.kv_cache) == history, "not healed"
        return history

    def intervene(self) -> None:
        """Borrow a session in the middle of a step, and leave it as it was."""
        with self.slots.borrow(self.one) as state:
            history = [*state.token_history]
            following = self.HISTORIES[min(self.step + 1, 9)][0]
            assert history in (self.HISTORIES[self.step][0], following), "torn"
            state.append([5])
            state.rewind(len(history), pending=0)

    def close_both(self) -> None:
        """Close both, perhaps in the middle of a step."""
        self.one.close()
        self.other.close()

    def end(self) -> None:
        """Close both, and require that every KV cache comes back once."""
        self.close_both()
        assert self.one.token_count == self.other.token_count == 0
        self.check_books()


AnyStory: TypeAlias = Story[MutableCache] | Story[FrozenCache]


def mutable(*, truncates: bool) -> AnyStory:
    """Begin a story with an engine whose steps change the KV cache."""
    engine = Mutable(truncates=truncates)
    return Story(engine.slots, engine.feed, engine.tokens, engine.books.check)


def functional(*, truncates: bool) -> AnyStory:
    """Begin a story with an engine whose steps return another KV cache."""
    engine = Functional(truncates=truncates)
    return Story(engine.slots, engine.feed, engine.tokens, engine.books.check)


BEGINNINGS: dict[str, Callable[[], AnyStory]] = {
    "mutable, truncates": partial(mutable, truncates=True),
    "mutable, no truncate": partial(mutable, truncates=False),
    "functional, truncates": partial(functional, truncates=True),
    "functional, no truncate": partial(functional, truncates=False),
}
