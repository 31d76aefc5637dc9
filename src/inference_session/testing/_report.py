"""Reports of a broken promise: the expected result, the actual one, and the calls that led there."""

from collections.abc import Sequence
from textwrap import indent

from attrs import frozen


class BrokenError(Exception):
    """An engine broke a promise. Only the kit sees it; a test gets an `AssertionError` with the same contents."""

    def __init__(self, expected: str, got: str, calls: Sequence[str]) -> None:
        super().__init__(expected, got)
        self.expected = expected
        self.got = got
        self.calls = list(calls)

    @property
    def size(self) -> tuple[int, int]:
        """The length for a reader: fewer calls are better, then fewer tokens."""
        return len(self.calls), sum(map(len, self.calls))


class ConclusiveError(BaseException):
    """A promise is broken, and another try would show it no better, but might take long."""

    def __init__(self, broken: BrokenError) -> None:
        super().__init__(broken)
        self.broken = broken


@frozen
class Report:
    """The text for an engine developer."""

    check: str
    promise: str
    broken: BrokenError
    again: str
    remark: str = ""

    def __str__(self) -> str:
        parts = [
            f"{self.check}: the engine breaks a promise.",
            f"Promise:   {self.promise}",
            f"Expected:  {self.broken.expected}",
            f"Got:       {self.broken.got}",
            "Shortest sequence of calls found that shows it:",
            indent("\n".join(self.broken.calls), "    "),
        ]
        if self.remark:
            parts.append(self.remark)
        parts.append("To run it again:")
        parts.append(indent(self.again, "    "))
        return "\n".join(parts)
