"""What files and branches cost, against moving the same bytes by hand."""

import os
from array import array
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from tests.benchmarks.measuring import Cost, Measure, timed
from tests.benchmarks.steps import TOKEN

from inference_session import Session
from inference_session.engine import StateSlots


SIZE = 256 << 20  # bytes of a KV cache
TOKENS = 100_000

KVCache = NDArray[np.uint8]


def dump(cache: KVCache, file: BinaryIO) -> None:
    """Write a KV cache."""
    file.write(cache.data)


def load(file: BinaryIO) -> KVCache:
    """Read a KV cache."""
    return np.fromfile(file, np.uint8, SIZE)


slots = StateSlots(
    create=lambda: np.empty(0, np.uint8),
    length=lambda cache: min(len(cache), 1),
    share=lambda cache, length: cache,
    dump=dump,
    load=load,
)


def wall(work: Callable[[], object]) -> Measure:
    """Measure seconds, as waiting for the disk is a part of the work."""

    def measure() -> float:
        start = perf_counter()
        work()
        return perf_counter() - start

    return measure


def test_files(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Saving and restoring cost little more than writing a KV cache to the disk and reading it: two checksums."""
    session, cache = Session(), np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    with slots.borrow(session) as state:
        state.append([1, 2])
        state.kv_cache = cache
        state.advance(1)

    def save_and_restore() -> None:
        slots.save(session, tmp_path / "session")
        slots.restore(tmp_path / "session")

    def dump_and_load() -> None:
        with (tmp_path / "cache").open("wb") as file:
            dump(cache, file)
            file.flush()
            os.fsync(file.fileno())
        with (tmp_path / "cache").open("rb") as file:
            load(file)

    try:
        Cost(
            "save and restore, 256 MB",
            wall(save_and_restore),
            "dump and load",
            wall(dump_and_load),
            2,  # where the disk is memory; less where it is a disk
            rounds=10,
        ).check(record_property)
    finally:
        for path in tmp_path.iterdir():
            path.unlink()


def test_branch(record_property: Callable[[str, object], None]) -> None:
    """A branch costs little more than a copy of the tokens, if the KV cache costs nothing."""
    ids, session = array("i", TOKEN) * TOKENS, Session()

    def branch(count: int) -> None:
        for _ in range(count):
            state.branch()

    def copy(count: int) -> None:
        for _ in range(count):
            ids[:]

    with slots.borrow(session) as state:
        state.append(ids)
        state.kv_cache = np.zeros(1, np.uint8)
        state.advance(1)
        Cost(
            f"branch, {TOKENS:,} tokens", timed(branch), "copy of an array", timed(copy), 3.5
        ).check(record_property)
