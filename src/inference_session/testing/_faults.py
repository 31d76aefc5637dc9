"""Steps made to fail, or closed, at chosen events."""

from asyncio import CancelledError
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

from attrs import define

from inference_session.exceptions import SessionClosedError
from inference_session.testing._report import ConclusiveError
from inference_session.testing._run import Run, Step, Talk
from inference_session.testing._watch import Event, Trigger


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


@define(eq=False)
class Close(Trigger):
    """The end of a session, at an event of a step."""

    talk: Talk

    def act(self) -> None:
        """Close it."""
        self.talk.session.close()


def fail_step(run: Run, talk: Talk, step: Step, fault: Fault) -> bool:
    """Do a step and make it fail; return whether the error was raised."""
    _fail(
        run,
        step.on(talk),
        run.call(talk, step),
        [fault],
        lambda result: run.take(talk, step, result),
    )
    return fault.fired is not None


def fail_step_twice(run: Run, talk: Talk, step: Step, fault: Fault) -> bool:
    """Do a step and make it fail after the model ran, and then in its rollback; return whether the latter happened."""
    first = Fault(after_the_model_ran, 0, InjectedError())
    _fail(
        run,
        step.on(talk),
        run.call(talk, step),
        [first, fault],
        lambda result: run.take(talk, step, result),
    )
    return fault.fired is not None


def fail_rewind(run: Run, talk: Talk, length: int, fault: Fault) -> bool:
    """Rewind a session and make that fail; return whether the error was raised."""

    def rewound(result: object) -> None:
        del talk.history[length:]

    _fail(
        run,
        f"with slots.borrow({talk}) as state: state.rewind({length})",
        lambda: run.borrowing(talk, lambda state: state.rewind(length)),
        [fault],
        rewound,
    )
    return fault.fired is not None


def close_within(run: Run, talk: Talk, step: Step, close: Close) -> None:
    """Close a session in the middle of a step."""
    run.calls.append(step.on(talk))
    run.watch.begin_step(close)
    call = run.call(talk, step)
    try:
        result = run.perform(call)
    except Exception as error:
        if close.fired is None or not isinstance(error, SessionClosedError):
            raise run.broken(
                "success or SessionClosedError", f"{type(error).__name__}: {error}"
            ) from error
    else:
        run.take(talk, step, result)
    if close.fired is None:
        run.close(talk)
        return
    run.failed = True
    run.calls[-1] += f"  # {talk}.close() is called {close.fired}"
    run.closed(talk)


def after_the_model_ran(event: Event) -> bool:
    """Whether the model has run on the first tokens of a step, and the session hasn't been told yet."""
    return str(event) == "before advance"


def _fail(
    run: Run,
    line: str,
    call: Callable[[], object],
    faults: Sequence[Fault],
    succeed: Callable[[object], None],
) -> None:
    run.calls.append(line)
    run.watch.begin_step(*faults)
    try:
        result = run.perform(call)
    except ConclusiveError:
        raise
    except BaseException as raised:
        fired = _note(run, faults)
        if not fired:
            if isinstance(raised, Exception):
                raise run.broken("no error", f"{type(raised).__name__}: {raised}") from raised
            raise
        # Ctrl-C must get through, even while another error is being handled.
        arriving = next((it for it in fired if not isinstance(it.error, Exception)), fired[0])
        if raised is not arriving.error:
            raise run.broken(
                f"the {arriving.name} to reach the caller", f"{type(raised).__name__}: {raised}"
            ) from raised
        raised.__traceback__ = raised.__context__ = None
    else:
        for fault in _note(run, faults):
            if not isinstance(fault.error, Exception):
                raise run.broken(f"the {fault.name} to reach the caller", "the step went on")
        succeed(result)  # an engine may recover from an error, if the result is right
    run.check_all()


def _note(run: Run, faults: Sequence[Fault]) -> list[Fault]:
    fired = [fault for fault in faults if fault.fired is not None]
    if fired:
        run.failed = True
        run.calls[-1] += "  # " + ", then ".join(f"{it.name} is raised {it.fired}" for it in fired)
    return fired
