"""Writes the list of errors that heads the reference: when you get each, and when you don't, as its docstring says."""

import inspect
import re
from pathlib import Path

from inference_session import exceptions


NOT = "You do *not* get it"


def when(error: type[Exception]) -> tuple[str, str]:
    """Return when you get an error, and when you don't."""
    paragraphs = [" ".join(part.split()) for part in (inspect.getdoc(error) or "").split("\n\n")]
    (about_not,) = (part for part in paragraphs if NOT in part)
    return paragraphs[0], about_not.partition(NOT)[2].strip(" ,")


def write(path: Path) -> None:
    """Write the list, the root of all errors first."""
    lines: list[str] = []
    for name in sorted(exceptions.__all__, key=lambda name: (name != "SessionError", name)):
        means, do_not = when(getattr(exceptions, name))
        lines += [f"{{name}}`{name}`", f": {_linked(means)}", "", f"  {NOT} {_linked(do_not)}", ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")


def _linked(text: str) -> str:
    return re.sub("`.+?`", r"{name}\g<0>", text)
