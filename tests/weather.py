"""Interrupts that strike at a chosen instant: at the first of all delivery points, at the second, and so on.

CPython delivers interrupts (what signal handlers raise, and `PyThreadState_SetAsyncExc`) on entering a Python function,
after calls of C functions and on backward jumps, nowhere else. So the delivery points can be counted.
"""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import CodeType, FrameType

from inference_session.exceptions import SessionClosedError


class Strike(BaseException):
    """As `KeyboardInterrupt`, but nobody else's."""


class Weather:
    """Counts the delivery points of interrupts while it is `armed`, and acts at some of them."""

    def __init__(self) -> None:
        self.armed = False
        self.reached = 0
        self.strikes: frozenset[int] = frozenset()
        self.act: Callable[[], None] = strike
        self.acting = False
        self.watch: Callable[[], None] = lambda: None

    def point(self, code: CodeType) -> None:
        """Be told of a delivery point."""
        if not self.armed or self.acting or code is THE_RUN:
            return
        self.reached += 1
        if self.reached in self.strikes:
            self.acting = True
            try:
                self.act()
            finally:
                self.acting = False

    def run(
        self, scenario: Callable[[], None], *strikes: int, act: Callable[[], None] | None = None
    ) -> BaseException | None:
        """Run a scenario, act at some delivery points, and return what it raised."""
        self.reached = 0
        self.strikes = frozenset(strikes)
        self.act = act or strike
        self.watch()
        try:
            self.armed = True
            scenario()
        except (Strike, SessionClosedError) as error:
            self.armed = False
            return error
        finally:
            self.armed = False
        return None


THE_RUN = Weather.run.__code__


def strike() -> None:
    """Interrupt."""
    raise Strike


if sys.version_info >= (3, 12):
    TOOL = 4

    @contextmanager
    def delivery_points(weather: Weather) -> Generator[None, None, None]:
        """Tell of every delivery point."""
        monitoring = sys.monitoring
        events = monitoring.events

        def entered(code: CodeType, offset: int) -> None:
            weather.point(code)

        def returned(code: CodeType, offset: int, function: object, first: object) -> None:
            weather.point(code)

        def jumped(code: CodeType, offset: int, destination: int) -> None:
            if destination < offset:
                weather.point(code)

        monitoring.use_tool_id(TOOL, "weather")
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
    def delivery_points(weather: Weather) -> Generator[None, None, None]:
        """Tell of most delivery points: not of backward jumps, nor of calls of types."""

        def told(frame: FrameType, event: str, argument: object) -> None:
            if event in {"call", "c_return"}:
                weather.point(frame.f_code)

        def watch() -> None:
            sys.setprofile(told)  # what it raises ends it

        weather.watch = watch
        try:
            yield
        finally:
            sys.setprofile(None)
