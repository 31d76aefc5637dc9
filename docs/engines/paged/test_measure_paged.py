"""The measurements of the page: they run, and count the blocks right."""

from __future__ import annotations

import pytest

from llama_model import random_model
from measure_paged import SIZES, sharing, throughput


def test_throughput(capsys: pytest.CaptureFixture[str]) -> None:
    """There is a row for each size of a batch, and one session is the measure."""
    throughput(random_model(0), length=20, seconds=0.001)
    head, _, first, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("| sessions in a batch |")
    assert first.startswith("| 1 | 1.0 |")
    assert len(rows) == len(SIZES) - 1


def test_sharing(capsys: pytest.CaptureFixture[str]) -> None:
    """Eight conversations share four blocks, and have one each of their own, or have five each."""
    sharing(random_model(0), count=8, system=64, own=15)
    assert capsys.readouterr().out.splitlines()[-1] == "| blocks held | 12 | 40 | 3.3 |"
