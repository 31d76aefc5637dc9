"""The page that tells why: its scripts show what it says they do."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).parent
PAGE = HERE.parents[1].joinpath("why.md").read_text("utf-8")
SCRIPTS = [HERE / f"{name}.py" for name in ("copied", "two_threads", "failed_step")]
VARYING = {"two_threads.py"}
"""Whose numbers differ from run to run."""


def test_scripts_are_on_the_page() -> None:
    """No script is left out, and none shows only the half of it."""
    assert len(SCRIPTS) == 3
    for script in SCRIPTS:
        shown = f"```{{literalinclude}} engines/transformers/{script.name}\n"
        for function in ("without_a_session", "with_a_session"):
            assert f"{shown}:pyobject: {function}\n```" in PAGE


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_output_is_that_of_the_page(script: Path) -> None:
    """What a script claims holds, or it fails; and it prints what the page says, word by word."""
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=300
    )
    assert (run.returncode, run.stderr) == (0, "")
    output, page = run.stdout, PAGE
    if script.name in VARYING:
        output, page = re.sub(r"\d+", "N", output), re.sub(r"\d+", "N", page)
    assert f"```text\n{output}```" in page
