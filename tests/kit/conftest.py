"""What the kit's own tests have in common."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from inference_session.testing import _scenario


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Don't wait long for an engine that hangs: those here take no time."""
    monkeypatch.setattr(_scenario, "PATIENCE", 1.0)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Let garbage that a check left behind warn in its own test, where warnings are errors."""
    yield
    gc.collect()
