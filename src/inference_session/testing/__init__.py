"""For engine developers' test suites: checks of whether an engine keeps the state of its sessions right.

It needs nothing of an engine but the `inference_session.engine.Engine` protocol, and the extra `testing`:
`pip install "inference-session[testing]"`.
"""

try:
    import hypothesis
    import pytest
except ModuleNotFoundError as _error:
    raise ModuleNotFoundError(
        "inference_session.testing needs Hypothesis and pytest: "
        'pip install "inference-session[testing]"',
        name=_error.name,
    ) from _error

from inference_session.testing._kit import check_engine, parametrize_with_checks


__all__ = ["check_engine", "parametrize_with_checks"]

del hypothesis, pytest  # needed by others; nothing to offer here
