"""For engine developers' test suites: checks that an engine keeps the state of its sessions right.

The engine needs nothing but the `inference_session.engine.Engine` protocol; you need the extra `testing`:
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

del hypothesis, pytest  # imported above only to check for them
