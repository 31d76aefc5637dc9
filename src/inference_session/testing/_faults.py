"""Steps that are disturbed: made to fail, closed, or met by another thread, at chosen events."""

from asyncio import CancelledError
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import permutations
from threading import Event as Signal
from typing import Final, NoReturn

from attrs import define, field

from inference_session.exceptions import SessionBusyError, SessionClosedError
from inference_session.testing import _scenario
from inference_session.testing._observer import Event, Trigger, reporting
from inference_session.testing._scenario import (
    BrokenError,
    Chat,
    ConclusiveError,
    Scenario,
    Step,
    done,
    elsewhere,
    told,
)


# Errors


class InjectedError(Exception):
    """The error of a step made to fail by the kit."""


ERRORS: Final[Sequence[type[BaseException]]] = (
    InjectedError,
    MemoryError,
    KeyboardInterrupt,
    CancelledError,
)


@define(eq=False)
class Fault(Trigger):
    """An error, raised at an event of a step."""

    error: BaseException

    def act(self) -> NoReturn:
        """Raise it."""
        raise self.error

    @property
    def name(self) -> str:
        """The name of the error's class."""
        return type(self.error).__name__


def fail_step(run: Scenario, chat: Chat, step: Step, *faults: Fault) -> bool:
    """Do a step and make it fail; return whether all of the errors were raised."""
    run.note(step.on(chat), chat)
    return _fail(run, run.call(chat, step), faults, lambda result: run.take(chat, step, result))


def fail_step_twice(run: Scenario, chat: Chat, step: Step, fault: Fault) -> bool:
    """Do a step and make it fail after the model ran, and then in its rollback; return whether the latter happened."""
    return fail_step(run, chat, step, Fault(after_the_model_ran, 0, InjectedError()), fault)


def fail_batch(run: Scenario, chats: Sequence[Chat], fault: Fault) -> bool:
    """Decode a batch and make it fail; return whether the error was raised."""
    run.note(f"engine.decode_batch([{', '.join(map(str, chats))}])", *chats)
    return _fail(run, run.batch_call(chats), [fault], lambda result: run.take_batch(chats, result))


def fail_rewind(run: Scenario, chat: Chat, length: int, fault: Fault) -> bool:
    """Rewind a session and make that fail; return whether the error was raised."""

    def rewound(result: object) -> None:
        del chat.history[length:]

    run.note(f"with slots.borrow({chat}) as state: state.rewind({length})", chat)
    return _fail(
        run,
        lambda: run.borrowing(chat, lambda state: state.rewind(length)),
        [fault],
        rewound,
    )


def after_the_model_ran(event: Event) -> bool:
    """Whether the model has run on the first tokens of a step, and the session hasn't been told yet."""
    return str(event) == "before advance"


def _fail(
    run: Scenario,
    call: Callable[[], object],
    faults: Sequence[Fault],
    succeed: Callable[[object], None],
) -> bool:
    run.watch.begin_step(*faults)
    try:
        result = run.perform(call)
    except ConclusiveError:
        raise
    except BaseException as raised:
        fired = _note(run, faults)
        if not fired:
            if isinstance(raised, Exception):
                raise run.failure("no error", raised) from raised
            raise
        # Ctrl-C must get through, even while another error is being handled.
        arriving = next((it for it in fired if not isinstance(it.error, Exception)), fired[0])
        if raised is not arriving.error:
            raise run.broken(f"the {arriving.name} to reach the caller", told(raised)) from raised
        raised.__traceback__ = raised.__context__ = None
    else:
        fired = _note(run, faults)
        run.watch.begin_step()
        for fault in fired:
            if not isinstance(fault.error, Exception):
                raise run.broken(f"the {fault.name} to reach the caller", "the step went on")
        succeed(result)  # an engine may recover from an error, if the result is right
    run.check_all()
    return len(fired) == len(faults)


def _note(run: Scenario, faults: Sequence[Fault]) -> list[Fault]:
    fired = [fault for fault in faults if fault.fired is not None]
    if fired:
        run.failed = True
        run.remark(", then ".join(f"{it.name} is raised {it.fired}" for it in fired))
    return fired


# Closing


@define(eq=False)
class Close(Trigger):
    """The end of a session, at an event of a step."""

    chat: Chat

    def act(self) -> None:
        """Close it."""
        self.chat.session.close()


def close_within(run: Scenario, chat: Chat, step: Step, close: Close) -> None:
    """Close a session in the middle of a step."""
    run.note(step.on(chat), chat)
    run.watch.begin_step(close)
    call = run.call(chat, step)
    try:
        result = run.perform(call)
    except Exception as error:
        if close.fired is None or not isinstance(error, SessionClosedError):
            raise run.failure("success or SessionClosedError", error) from error
    else:
        run.take(chat, step, result)
    if close.fired is None:
        run.close(chat)
        return
    run.failed = True
    run.remark(f"{chat}.close() is called {close.fired}")
    run.closed(chat)


# Threads

A_MOMENT: Final = 0.02
"""How many seconds a step may wait for one of another session at least; or five times as long as steps take."""


@define(eq=False)
class Pause(Trigger):
    """A pause at an event of a step."""

    chat: Chat
    reached: Signal = field(init=False, factory=Signal)
    over: Signal = field(init=False, factory=Signal)
    in_borrow: bool = field(init=False, default=False)
    """Whether the session was borrowed at that event."""

    def act(self) -> None:
        """Wait until the other thread has tried."""
        self.in_borrow = self.chat.session.borrowed
        self.reached.set()
        self.over.wait(2 * _scenario.PATIENCE)


def race(run: Scenario, chat: Chat, first: Step, second: Step, pause: Pause) -> None:
    """Do two steps of one session at once, the second while the first is paused."""
    steps = [(chat, first), (chat, second)]
    won: list[tuple[Step, object]] = []
    for (_, step), future in zip(steps, _at_once(run, steps, pause), strict=True):
        try:
            won.append((step, future.result()))
        except SessionBusyError:
            pass
        except Exception as error:
            raise run.failure("success or SessionBusyError", error) from error
    if not won:
        raise run.broken("one of the steps to succeed", "SessionBusyError in both")
    if pause.in_borrow and len(won) > 1:
        raise run.broken("SessionBusyError for the second step", "both steps succeeded")
    _find_order(run, chat, won)
    run.check_all()


def step_together(run: Scenario, steps: Sequence[tuple[Chat, Step]], pause: Pause) -> None:
    """Do two steps of different sessions at once, the second while the first is paused."""
    for (chat, step), future in zip(steps, _at_once(run, steps, pause), strict=True):
        run.take(chat, step, run.attempt(future.result))
    run.check_all()


def _at_once(
    run: Scenario, steps: Sequence[tuple[Chat, Step]], pause: Pause
) -> Sequence[Future[object]]:
    """Do two steps at once, each in a thread of its own, and wait for both."""
    (chat, first), (other, second) = steps
    run.note(f"{first.on(chat)}  # in one thread", chat, other)
    run.note(f"{second.on(other)}  # in another, meanwhile", other)
    run.watch.begin_step(pause)
    with reporting(run.inside, run.watch):
        one = elsewhere(run.call(chat, first))
        one.add_done_callback(lambda _: pause.reached.set())
        try:
            if not pause.reached.wait(_scenario.PATIENCE):
                raise ConclusiveError(run.broken("the first step to end", "it hangs"))
            if pause.fired is None:
                run.watch.begin_step()
            else:
                run.remark(f"which stops {pause.fired}", call=-2)
                run.proofs += pause.in_borrow
            two = elsewhere(run.call(other, second))
            _wait_a_moment(run, two, busy=pause.in_borrow and chat is other)
        finally:
            pause.over.set()
        if not done(one, two, seconds=_scenario.PATIENCE):
            raise ConclusiveError(run.broken("both steps to end", "one hangs"))
    run.watch.begin_step()
    return one, two


def _wait_a_moment(run: Scenario, two: Future[object], *, busy: bool) -> None:
    """Give the second step the time to end, while the first is paused; it must, if it finds its session busy."""
    moment = max(A_MOMENT, 5 * run.slowest)
    if not done(two, seconds=_scenario.PATIENCE if busy else moment) and busy:
        raise ConclusiveError(
            run.broken(
                "SessionBusyError at once",
                "the second step waits for the first: "
                "let a step borrow the session before it waits for a lock",
            )
        )


def _find_order(run: Scenario, chat: Chat, won: Sequence[tuple[Step, object]]) -> None:
    """Find an order of the steps that explains their results and the session's tokens."""
    tokens = run.tokens(chat)
    broken = run.broken("the tokens of the steps, one after the other", f"{tokens}")
    before, calls = list(chat.history), list(run.calls)
    for order in permutations(won):
        if tokens == [*before, *(t for step, result in order for t in step.added(result))]:
            try:
                for step, result in order:
                    run.take(chat, step, result)
            except BrokenError as error:  # unless the other order gives the same tokens
                broken, chat.history, run.calls = error, list(before), list(calls)
            else:
                return
    raise broken
