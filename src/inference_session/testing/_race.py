"""Two threads on one session: one is paused in the middle of its step, and the other tries to step."""

from collections.abc import Callable, Sequence
from itertools import permutations
from threading import Event as Signal

from attrs import define, field

from inference_session.exceptions import SessionBusyError
from inference_session.testing import _threads
from inference_session.testing._report import BrokenError, ConclusiveError
from inference_session.testing._run import Run, Step, Talk
from inference_session.testing._threads import Elsewhere
from inference_session.testing._watch import Trigger


A_MOMENT = 0.05
"""How many seconds a step may wait for another one outside of its borrow."""


@define(eq=False)
class Pause(Trigger):
    """A pause at an event of a step."""

    talk: Talk
    reached: Signal = field(init=False, factory=Signal)
    over: Signal = field(init=False, factory=Signal)
    in_borrow: bool = field(init=False, default=False)
    """Whether the session was borrowed at that event."""

    def act(self) -> None:
        """Wait until the other thread has tried."""
        self.in_borrow = self.talk.session.borrowed
        self.reached.set()
        self.over.wait(2 * _threads.PATIENCE)


def race(run: Run, talk: Talk, first: Step, second: Step, pause: Pause) -> None:
    """Do two steps at once, the second while the first is paused."""
    run.calls.append(f"{first.on(talk)}  # in one thread")
    run.calls.append(f"{second.on(talk)}  # in another, meanwhile")
    run.watch.begin_step(pause)
    one = Elsewhere(_telling(run.call(talk, first), pause.reached)).start()
    two = Elsewhere(run.call(talk, second))
    try:
        if not pause.reached.wait(_threads.PATIENCE):
            raise ConclusiveError(run.broken("the first step to end", "it hangs"))
        if pause.fired is None:
            run.watch.begin_step()
        else:
            run.calls[-2] += f", which stops {pause.fired}"
            run.proofs += pause.in_borrow
        two.start()
        if not two.done(_threads.PATIENCE if pause.in_borrow else A_MOMENT) and pause.in_borrow:
            raise ConclusiveError(
                run.broken(
                    "SessionBusyError at once",
                    "the second step waits for the first: "
                    "let a step borrow the session before it waits for a lock",
                )
            )
    finally:
        pause.over.set()
    if not (one.done(_threads.PATIENCE) and two.done(_threads.PATIENCE)):
        raise ConclusiveError(run.broken("both steps to end", "one hangs"))
    _compare(run, talk, pause, [(first, one), (second, two)])
    run.check_all()


def _compare(
    run: Run, talk: Talk, pause: Pause, steps: Sequence[tuple[Step, Elsewhere[object]]]
) -> None:
    """Check the outcomes and the results of both steps."""
    won: list[tuple[Step, object]] = []
    for step, call in steps:
        try:
            won.append((step, call.result()))
        except SessionBusyError:
            pass
        except Exception as error:
            raise run.broken(
                "success or SessionBusyError", f"{type(error).__name__}: {error}"
            ) from error
    if not won:
        raise run.broken("one of the steps to succeed", "SessionBusyError in both")
    if pause.in_borrow and len(won) > 1:
        raise run.broken("SessionBusyError for the second step", "both steps succeeded")
    _find_order(run, talk, won)


def _find_order(run: Run, talk: Talk, won: Sequence[tuple[Step, object]]) -> None:
    """Find an order of the steps that explains their results and the session's tokens."""
    tokens = run.tokens(talk)
    broken = run.broken("the tokens of the steps, one after the other", f"{tokens}")
    before, calls = list(talk.history), list(run.calls)
    for order in permutations(won):
        if tokens == [*before, *(t for step, result in order for t in step.added(result))]:
            try:
                for step, result in order:
                    run.take(talk, step, result)
            except BrokenError as error:  # unless the other order gives the same tokens
                broken, talk.history, run.calls = error, list(before), list(calls)
            else:
                return
    raise broken


def _telling(call: Callable[[], object], ended: Signal) -> Callable[[], object]:
    def telling() -> object:
        try:
            return call()
        finally:
            ended.set()

    return telling
