"""Measure all, and write the page: `python -m tests.benchmarks.comparison`, as `nox -s comparison` does.

`--quick` measures less, writes nothing, and fails if something that must hold at any size doesn't, or if the page isn't
what the results give. `--render` writes the page from results that are there.
"""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from tests.benchmarks.comparison import bookkeeping, memory, page, prefix, recovery
from tests.benchmarks.comparison.records import Record, alone, circumstances


DOCS = Path(__file__).parents[3] / "docs"
PAGE, RESULTS = DOCS / "comparison.md", DOCS / "comparison.json"

MEASUREMENTS = {
    "bookkeeping": bookkeeping.MEASUREMENT,
    "prefix": prefix.MEASUREMENT,
    "memory": memory.MEASUREMENT,
    "recovery": recovery.MEASUREMENT,
}


def main() -> None:
    """Do what the arguments ask for."""
    parser = argparse.ArgumentParser(prog="comparison", description=__doc__)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="measure less, and write nothing")
    how.add_argument("--render", action="store_true", help="only write the page anew")
    options = parser.parse_args()

    if options.quick:
        failed = false_claims(measure(quick=True), quick=True)
        if PAGE.read_text("utf-8") != page.render(MEASUREMENTS, stored()):
            failed.append(f"{PAGE.name} is what {RESULTS.name} gives")
    else:
        if not options.render:
            results = {"made_by": circumstances(), "records": measure(quick=False)}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        PAGE.write_text(page.render(MEASUREMENTS, stored()), "utf-8")
        failed = false_claims(stored()["records"], quick=False)
    for claim in failed:
        sys.stderr.write(f"DOES NOT HOLD: {claim}\n")
    sys.exit(bool(failed))


def measure(*, quick: bool) -> dict[str, list[Record]]:
    """Return the records of each measurement."""
    records: dict[str, list[Record]] = {}
    for name, measurement in MEASUREMENTS.items():
        start = perf_counter()
        records[name] = [*alone(partial(measurement.measure, quick=quick))]
        sys.stderr.write(f"{name}: {perf_counter() - start:.0f} s\n")
    return records


def stored() -> dict[str, Any]:
    """Return the results of the last full run."""
    results: dict[str, Any] = json.loads(RESULTS.read_text("utf-8"))
    return results


def false_claims(records: dict[str, list[Record]], *, quick: bool) -> list[str]:
    """Return what doesn't hold; a short run need not show all that a full one does."""
    return [
        claim.text
        for name, measurement in MEASUREMENTS.items()
        for claim in measurement.claims(records[name])
        if not claim.holds and (claim.always or not quick)
    ]


if __name__ == "__main__":
    # One thread each, of every library: scheduling isn't compared.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    main()
