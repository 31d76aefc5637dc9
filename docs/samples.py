"""A pytest plugin that runs the samples in Markdown files and in the package's docstrings.

It runs all of them: none can be marked to be skipped.
"""

from doctest import ELLIPSIS
from pathlib import Path

from sybil import Sybil
from sybil.parsers import myst, rest


ROOT = str(Path(__file__).parents[1])

markdown = Sybil(
    parsers=[myst.PythonCodeBlockParser(doctest_optionflags=ELLIPSIS)],
    path=ROOT,
    patterns=["*.md"],
)
docstrings = Sybil(
    parsers=[rest.DocTestParser(optionflags=ELLIPSIS)],
    path=ROOT,
    patterns=["src/**/*.py"],
)

pytest_collect_file = (markdown + docstrings).pytest()
