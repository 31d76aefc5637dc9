"""Interrupts at chosen instants: at the first of all delivery points, at the second, and so on.

CPython delivers interrupts (exceptions from signal handlers and from `PyThreadState_SetAsyncExc`) on entering a Python
function, after calls of C functions and on backward jumps, nowhere else. So the delivery points can be counted.
"""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import CodeType, FrameType

from inference_session.exceptions import SessionClosedError


class Interrupt(BaseException):
    """Like `KeyboardInterrupt`, but raised by nobody else."""


class Interrupter:
    """Counts the delivery points of interrupts while it is `armed`, and acts at some of them."""

    def __init__(self) -> None:
        self.armed = False
        self.reached = 0
        self.points: frozenset[int] = frozenset()
        self.act: Callable[[], None] = interrupt
        self.acting = False
        self.watch: Callable[[], None] = lambda: None

    def point(self, code: CodeType) -> None:
        """Count a delivery point, and act if it is one of the chosen ones."""
        if not self.armed or self.acting or code is THE_RUN:
            return
        self.reached += 1
        if self.reached in self.points:
            self.acting = True
            try:
                self.act()
            finally:
                self.acting = False

    def run(
        self, scenario: Callable[[], None], *points: int, act: Callable[[], None] | None = None
    ) -> BaseException | None:
        """Run a scenario, act at some delivery points, and return its exception."""
        self.reached = 0
        self.points = frozenset(points)
        self.act = act or interrupt
        self.watch()
        try:
            self.armed = True
            scenario()
        except (Interrupt, SessionClosedError) as error:
            self.armed = False
            return error
        finally:
            self.armed = False
        return None


THE_RUN = Interrupter.run.__code__


def interrupt() -> None:
    """Interrupt."""
    raise Interrupt


if sys.version_info >= (3, 12):
    TOOL = 4

    @contextmanager
    def delivery_points(interrupter: Interrupter) -> Generator[None, None, None]:
        """Report every delivery point."""
        monitoring = sys.monitoring
        events = monitoring.events

        def entered(code: CodeType, offset: int) -> None:
            interrupter.point(code)

        def returned(code: CodeType, offset: int, function: object, first: object) -> None:
            interrupter.point(code)

        def jumped(code: CodeType, offset: int, destination: int) -> None:
            if destination < offset:
                interrupter.point(code)

        monitoring.use_tool_id(TOOL, "interrupter")
        monitoring.register_callback(TOOL, events.PY_START, entered)
        monitoring.register_callback(TOOL, events.PY_RESUME, entered)
        monitoring.register_callback(TOOL, events.C_RETURN, returned)
        monitoring.register_callback(TOOL, events.JUMP, jumped)
        # C_RETURN comes with CALL.
        monitoring.set_events(TOOL, events.PY_START | events.PY_RESUME | events.CALL | events.JUMP)
        try:
            yield
        finally:
            monitoring.set_events(TOOL, 0)
            for event in (events.PY_START, events.PY_RESUME, events.C_RETURN, events.JUMP):
                monitoring.register_callback(TOOL, event, None)
            monitoring.free_tool_id(TOOL)

else:

    @contextmanager
    def delivery_points(interrupter: Interrupter) -> Generator[None, None, None]:
        """Report most delivery points: neither backward jumps nor calls of types."""

        def told(frame: FrameType, event: str, argument: object) -> None:
            if event in {"call", "c_return"}:
                interrupter.point(frame.f_code)

        def watch() -> None:
            sys.setprofile(told)  # an exception in it ends it

        interrupter.watch = watch
        try:
            yield
        finally:
            sys.setprofile(None)
