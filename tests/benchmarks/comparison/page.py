"""The page, from the results."""

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen
from tests.benchmarks.comparison.sections import SECTIONS, Section


@frozen
class Report:
    """The page, and what of it is not true."""

    text: str
    failed: list[str] = field(factory=list[str])


HEAD = """# Measured comparisons

% Written by tests/benchmarks/comparison from the results in docs/comparison/: change those, not this.

:::{warning}
Read this first.

- The figures are of one machine, named below each, and a small one: seconds will be others elsewhere. Ratios carry
  over better, and are taken in one run, of rounds that take turns, so that other load meets all alike.
- The models are small, or tiny with random weights, and run on a CPU. What a session adds to a step is seconds, not a
  share: the larger the model, the smaller the share.
- The peers do other things besides, that a session doesn't: mlx-lm's trie searches many conversations at once,
  where a session looks at its own only. What is compared is the path that one conversation takes through their code.
- Who wrote the library chose what to measure. Each measurement is a short module in `tests/benchmarks/comparison/`,
  with the reasons in it.
- Every sentence with a number from the results is checked when the page is written, and `nox` fails if it doesn't
  hold.
:::

All of it is made again, page and plots included, by one command:

```sh
{command}
```
"""


def render(results: Mapping[str, Any], *, quick: bool = False) -> Report:
    """Return the page; a short run need not show all that a full one does."""
    sections = {name: SECTIONS[name](result["records"]) for name, result in results.items()}
    command = next(iter(results.values()))["made_by"]["command"]
    text = "\n".join(
        [
            HEAD.replace("{command}", command),
            *(_section(name, section, results[name]) for name, section in sections.items()),
        ]
    )
    failed = [
        claim.text
        for section in sections.values()
        for claim in section.claims
        if not claim.holds and (claim.always or not quick)
    ]
    return Report(text, failed)


def _section(name: str, section: Section, result: Mapping[str, Any]) -> str:
    made_by = result["made_by"]
    versions = ", ".join(f"{library} {number}" for library, number in made_by["versions"].items())
    plots = "\n".join(
        f"```{{image}} comparison/{name}-{mode}.svg\n:class: only-{mode}\n:alt: {section.question}\n```\n"
        for mode in ("light", "dark")
    )
    claims = "\n".join(f"- {claim.text}" for claim in section.claims)
    return f"""## {section.title}

{section.question}

{plots}
{claims}

{section.how}

<details>
<summary>All figures</summary>

{section.table}

</details>

*Made by `{made_by["command"]}` on {made_by["machine"]}, with {made_by["python"]}, {versions}.*
"""
