"""The table of costs, after all that pytest has to say."""

from pytest import TerminalReporter  # noqa: PT013 for the type alone


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """Print what every test measured, whether it passed or failed."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    rows = [dict(report.user_properties) for report in reports]
    terminalreporter.section("costs")
    terminalreporter.line(f"{'ratio':>7} {'limit':>7}  what / against")
    for row in rows:
        if "ratio" in row:
            terminalreporter.line("{ratio:7.3f} {limit:7.3f}  {what} / {against}".format(**row))
