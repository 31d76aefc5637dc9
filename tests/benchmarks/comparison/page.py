"""The page, from the records: its text is the measurements' docstrings, claims and tables."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from attrs import frozen
from tests.benchmarks.comparison.records import Record


HEAD = """# Measured comparisons

% Written by tests/benchmarks/comparison from the results in comparison.json: change those, not this.

:::{warning}
Read this first.

- The figures are of one small machine, named at the end: seconds will be others elsewhere. Ratios carry over better.
  They are taken in one run, of rounds that take turns, so that other load affects all alike.
- The models are small, or tiny with random weights, and run on a CPU. A session adds an amount of time to a step, not a
  share: the larger the model, the smaller the share.
- The peers do more than a session does: mlx-lm's trie searches many conversations at once, a session its own only.
  The path of one conversation through their code is compared.
- The library's authors chose the measurements. Each is a short module in `tests/benchmarks/comparison/`.
- Every statement below with a number is checked when the page is written, and `nox` fails if it doesn't hold.
:::

One command makes all of it again:

```sh
python -m nox -s comparison
```
"""


@frozen
class Claim:
    """A statement with the numbers that it is about."""

    text: str
    holds: bool
    always: bool = True
    """Whether it must hold in a short run on a busy machine, too."""


@frozen
class Measurement:
    """A module that measures something, and its part of the page."""

    description: str | None
    """Its docstring: a title, and how it is measured."""
    measure: Callable[..., Sequence[Record]]
    claims: Callable[[Sequence[Record]], Sequence[Claim]]
    table: Callable[[Sequence[Record]], str]

    def render(self, records: Sequence[Record]) -> str:
        """Return its part of the page."""
        title, _, how = (self.description or "").strip().partition("\n\n")
        claims = "\n".join(f"- {claim.text}" for claim in self.claims(records))
        return f"## {title.removesuffix('.')}\n\n{claims}\n\n{self.table(records)}\n\n{how}\n"


def render(measurements: Mapping[str, Measurement], results: Mapping[str, Any]) -> str:
    """Return the page."""
    parts = [
        measurement.render(results["records"][name]) for name, measurement in measurements.items()
    ]
    return "\n".join([HEAD, *parts, f"*Measured on {results['made_by']}.*\n"])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown; all columns but the first are numbers."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def duration(seconds: float) -> str:
    """Write seconds, to two digits, in a unit that suits them."""
    rounded = float(f"{seconds:.2g}")
    for unit, name in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if rounded >= unit:
            return f"{rounded / unit:g} {name}"
    return f"{rounded / 1e-9:g} ns"


def times(ratio: float) -> str:
    """Write how many times one thing is another."""
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"


def percent(share: float) -> str:
    """Write a share."""
    return f"{100 * share:.2g} %"
