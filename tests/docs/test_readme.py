"""The README holds what it shows, wherever it is read."""

import re
import subprocess
import sys
from pathlib import Path

from markdown_it import MarkdownIt

import inference_session


README = Path(__file__).parents[2].joinpath("README.md").read_text("utf-8")


def code(before: str, language: str) -> list[str]:
    """Return the code blocks in a language that follow something."""
    return re.findall(rf"{before}^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_samples_run_as_printed(tmp_path: Path) -> None:
    """The samples, pasted one after the other into an empty file, print what the README says."""
    script = tmp_path / "pasted.py"
    script.write_text("\n".join(code("", "python")), "utf-8")
    package = Path(inference_session.__file__).parents[1]
    ended = subprocess.run(
        [sys.executable, "-W", "error", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not ended.stderr
    printed = code("^```\n\n", "text")
    assert printed
    assert ended.stdout.split() == " ".join(printed).split()


def test_links_are_absolute() -> None:
    """No link is dead on the page of a package index; the site makes links of the paths of its pages."""
    tokens = [token for block in MarkdownIt().parse(README) for token in block.children or []]
    links = [str(token.attrs["href"]) for token in tokens if token.type == "link_open"]
    assert not [link for link in links if not link.startswith("https://")]
