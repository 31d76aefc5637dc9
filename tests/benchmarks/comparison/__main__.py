"""Measure all, and write the page: `python -m tests.benchmarks.comparison`, as `nox -s comparison` does.

`--quick` measures less, writes nothing, and fails if something that must hold at any size doesn't, or if the page isn't
what the results give. `--render` writes the page from results that are there.
"""

import argparse
import json
import os
import re
import sys
from math import isclose
from pathlib import Path
from time import perf_counter
from typing import Any

from tests.benchmarks.comparison import page, plots
from tests.benchmarks.comparison.records import alone, circumstances, measured


DOCS = Path(__file__).parents[3] / "docs"
RESULTS = DOCS / "comparison"
NUMBER = re.compile(r"\d+\.\d+")

MEASUREMENTS = ("bookkeeping", "prefix", "growth", "memory", "recovery")
DISTRIBUTIONS = (
    "attrs",
    "jax",
    "llama-cpp-python",
    "mlx",
    "mlx-lm",
    "numpy",
    "torch",
    "transformers",
)


def main() -> None:
    """Do what the arguments ask for."""
    parser = argparse.ArgumentParser(prog="comparison", description=__doc__)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="measure less, and write nothing")
    how.add_argument("--render", action="store_true", help="only write the page anew")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS)
    options = parser.parse_args()

    if options.quick:
        results = {name: result(name, quick=True) for name in options.only}
        report = page.render(results, quick=True)
        stale = [
            path for path, text in rendered().items() if not same(path.read_text("utf-8"), text)
        ]
        failed = [*report.failed, *(f"{path.name} is not what the results give" for path in stale)]
    else:
        if not options.render:
            for name in options.only:
                text = json.dumps(result(name, quick=False), indent=1) + "\n"
                (RESULTS / f"{name}.json").write_text(text, "utf-8")
        for path, text in rendered().items():
            path.write_text(text, "utf-8")
        failed = page.render(stored()).failed
    for claim in failed:
        sys.stderr.write(f"DOES NOT HOLD: {claim}\n")
    sys.exit(bool(failed))


def result(name: str, *, quick: bool) -> dict[str, Any]:
    """Measure, and return the records with all that made them."""
    start = perf_counter()
    records = alone(measured, name, quick)
    sys.stderr.write(f"{name}: {len(records)} figures in {perf_counter() - start:.0f} s\n")
    return {"made_by": circumstances(*DISTRIBUTIONS), "records": records}


def stored() -> dict[str, Any]:
    """Return the results of the last full run."""
    return {
        name: json.loads((RESULTS / f"{name}.json").read_text("utf-8")) for name in MEASUREMENTS
    }


def same(one: str, other: str) -> bool:
    """Whether two texts are the same but for the last digits of numbers, in which processors differ."""
    numbers = zip(NUMBER.findall(one), NUMBER.findall(other), strict=False)
    return NUMBER.sub("", one) == NUMBER.sub("", other) and all(
        isclose(float(left), float(right), abs_tol=1e-4) for left, right in numbers
    )


def rendered() -> dict[Path, str]:
    """Return the page and its plots, by path."""
    results = stored()
    drawn = {
        RESULTS / f"{name}-{mode}.svg": svg
        for name in MEASUREMENTS
        for mode, svg in plots.draw(name, results[name]["records"]).items()
    }
    return {DOCS / "comparison.md": page.render(results).text, **drawn}


if __name__ == "__main__":
    # One thread each, of every library: what is compared is no scheduling.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    main()
