"""All engines of which it's known whether they are right, and the checks that must catch the others."""

from __future__ import annotations

from tests.kit import broken_engines, broken_models, catalogue, paged_engines, right_engines


RIGHT = (*right_engines.RIGHT, paged_engines.Paged)
BROKEN = catalogue.BROKEN
"""Filled by these modules."""

__all__ = ["BROKEN", "RIGHT", "broken_engines", "broken_models"]
