"""What is pinned in two places is the same in both."""

import re
import tomllib
from pathlib import Path


ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_ruff() -> None:
    """Ruff is the same before a commit and in CI, or one would undo what the other formats."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    (version,) = re.findall(r"ruff-pre-commit\n +rev: v(\S+)", hooks)
    assert f"ruff=={version}" in PYPROJECT["dependency-groups"]["lint"]


def test_version_is_in_the_changelog() -> None:
    """The version has a section of its own, with its date, right below what is unreleased."""
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    first = re.findall(r"^## (.*)$", changelog, re.MULTILINE)[:2]
    assert first[0] == "[Unreleased]"
    assert re.fullmatch(
        re.escape(f"[{PYPROJECT['project']['version']}] - ") + r"\d{4}-\d\d-\d\d", first[1]
    )
