"""Measures what batches and shared blocks save, and what paging costs; prints the page's tables.

Run it at the root of a checkout, with NumPy on one thread:

    export OPENBLAS_NUM_THREADS=1 PYTHONPATH=.:docs/engines/paged:docs/engines/numpy
    python docs/engines/paged/measure_paged.py

Times are those of the CPU, as they stand still while other programs run; a step's is the tenth
percentile of rounds that take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from time import process_time

import numpy as np
from tests.benchmarks.measuring import fastest_of

import smollm2
from inference_session import Session
from llama_model import Llama
from numpy_llama import LlamaEngine
from paged_engine import PagedEngine


SIZES = (1, 2, 4, 8, 16, 32)


def prompts(count: int, length: int) -> list[list[int]]:
    """Return prompts without a common beginning."""
    tokens: list[list[int]] = np.random.default_rng(0).integers(0, 128, (count, length)).tolist()
    return [[number, *rest[1:]] for number, rest in enumerate(tokens)]


@contextmanager
def conversations(
    engine: PagedEngine | LlamaEngine, prompts: Sequence[Sequence[int]]
) -> Generator[list[Session]]:
    """Give a session for each prompt, ready to decode."""
    with ExitStack() as closing:
        sessions = [closing.enter_context(Session()) for _ in prompts]
        for session, prompt in zip(sessions, prompts, strict=True):
            engine.prefill(session, prompt)
        yield sessions


def step(
    engine: PagedEngine | LlamaEngine, sessions: Sequence[Session], length: int
) -> Callable[[], float]:
    """Measure the seconds of a batch's step, from the same length each time."""

    def measure() -> float:
        start = process_time()
        engine.decode_batch(sessions)
        seconds = process_time() - start
        with engine.slots.borrow_all(sessions) as states:
            for state in states:
                state.rewind(length)
        return seconds

    return measure


def throughput(model: Llama, length: int, seconds: float) -> None:
    """Print how much more a batch does than one at a time, and what paging costs."""
    paged = PagedEngine(model, num_blocks=2 * SIZES[-1] * (length // 16 + 2))
    growing = LlamaEngine(model)
    beginnings = prompts(SIZES[-1], length)
    with conversations(paged, beginnings) as sessions, conversations(growing, beginnings) as others:
        costs = fastest_of(
            {("paged", size): step(paged, sessions[:size], length) for size in SIZES}
            | {("growing", size): step(growing, others[:size], length) for size in SIZES},
            seconds,
        )
    print("| sessions in a batch | throughput | step, against a growing cache |")
    print("| --- | --- | --- |")
    for size in SIZES:
        more = size * costs["paged", 1] / costs["paged", size]
        print(f"| {size} | {more:.1f} | {costs['paged', size] / costs['growing', size]:.2f} |")


def sharing(model: Llama, count: int, system: int, own: int) -> None:
    """Print what it takes until many conversations have their first tokens."""
    print("| | shared | not shared | ratio |")
    print("| --- | --- | --- | --- |")
    apart = prompts(count, system + own)
    together = [apart[0][:system] + prompt[system:] for prompt in apart]
    rows: list[tuple[float, int]] = []
    for beginnings in (together, apart):
        engine = PagedEngine(model, num_blocks=count * ((system + own) // 16 + 1))
        start = process_time()
        with conversations(engine, beginnings) as sessions:
            engine.decode_batch(sessions)
            rows.append((process_time() - start, engine.pool.held))
    (fast, few), (slow, many) = rows
    print(f"| seconds | {fast:.1f} | {slow:.1f} | {slow / fast:.1f} |")
    print(f"| blocks held | {few} | {many} | {many / few:.1f} |")


if __name__ == "__main__":
    smollm, _ = smollm2.load(smollm2.find_weights())
    throughput(smollm, length=128, seconds=4)
    sharing(smollm, count=64, system=256, own=16)
