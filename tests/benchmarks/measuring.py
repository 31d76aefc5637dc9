"""How costs are compared: as ratios within one run, of rounds that take turns. Seconds tell more about the machine."""

from collections.abc import Callable, Mapping
from math import inf
from time import perf_counter, process_time
from typing import TypeVar

from attrs import frozen


BATCH = 256
ROUNDS = 50

Name = TypeVar("Name")
Work = Callable[[int], object]
"""Does something so many times."""
Measure = Callable[[], float]
"""Returns the cost of a round of something, in whatever unit."""


def ratio_of(subject: Measure, baseline: Measure, limit: float, least: int = ROUNDS) -> float:
    """Compare the best of rounds that take turns, so that other load meets both; beyond the limit, take more rounds."""
    best_subject = best_baseline = inf
    for rounds in range(1, 10 * least + 1):
        best_subject = min(best_subject, subject())
        best_baseline = min(best_baseline, baseline())
        if rounds >= least and best_subject <= limit * best_baseline:
            break
    return best_subject / best_baseline


def timed(work: Work, count: int = BATCH) -> Measure:
    """Measure CPU seconds, as they stand still while others run. The loop is in the work, so that no call adds up."""

    def measure() -> float:
        start = process_time()
        work(count)
        return process_time() - start

    return measure


def fastest_of(measures: Mapping[Name, Measure], seconds: float) -> dict[Name, float]:
    """Measure each in rounds that take turns, so that other load meets all, until each has had its share of the time.

    Return the tenth percentile of its rounds: nearly the best, but not the one that a clock or a cache made up.
    """
    costs: dict[Name, list[float]] = {name: [] for name in measures}
    spent = dict.fromkeys(measures, 0.0)
    while names := [name for name in measures if spent[name] < seconds]:
        for name in names:
            start = perf_counter()
            costs[name].append(measures[name]())
            spent[name] += perf_counter() - start
    return {name: sorted(found)[len(found) // 10] for name, found in costs.items()}


@frozen
class Cost:
    """A row of the table that `conftest.py` prints."""

    what: str
    subject: Measure
    against: str
    baseline: Measure
    limit: float
    rounds: int = ROUNDS
    """How many at least."""

    def check(self, record_property: Callable[[str, object], None]) -> None:
        """Measure, leave a row for the table, and fail if the ratio is beyond the limit."""
        ratio = ratio_of(self.subject, self.baseline, self.limit, self.rounds)
        record_property("ratio", ratio)
        record_property("limit", self.limit)
        record_property("what", self.what)
        record_property("against", self.against)
        assert ratio <= self.limit
