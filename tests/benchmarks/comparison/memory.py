"""Memory to go on with a conversation.

How much memory does it take, at most, to go on with a conversation whose KV cache is kept? Several users can't go on
with one and the same cache, as each would see it change. So transformers' documentation copies it by `copy.deepcopy`,
and so does mlx-lm's server at every hit. A session is borrowed instead, by one user at a time. The bare cache, which
nothing protects, is the least that any way can take. All three are measured with transformers.

The kernel is asked for the highest resident memory of the process, beyond that at the start (Linux's `VmHWM`). Each way
has a process of its own, whose allocator gives large blocks back at once, so that a copy can't hide in freed memory.
The KV cache is filled with random numbers; then a small random model is fed a short prompt and two more tokens.
"""

# ruff: noqa: PLC0415 no process imports more of these libraries than it measures
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import copy
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.benchmarks.comparison.page import Claim, Measurement, table
from tests.benchmarks.comparison.records import Record, alone
from tests.benchmarks.comparison.subjects import VOCABULARY, Subject, prompt, transformers

from inference_session import Session


TOKENS, QUICK_TOKENS = 16_000, 1000
LAYERS, HEADS, HEAD_SIZE = 8, 8, 32
NEW_TOKENS, STEPS = 8, 3
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
WAYS = ("deepcopy", "session", "bare cache")
LEAST_COPY, MOST_OWNED, NEAR = 0.95, 0.5, 0.1


def measure(*, quick: bool) -> list[Record]:
    """Return the bytes of a KV cache, and those taken to go on with it, by way."""
    with patch.dict(os.environ, GIVE_BACK):
        return [alone(measure_way, way, QUICK_TOKENS if quick else TOKENS) for way in WAYS]


def measure_way(way: str, tokens: int) -> Record:
    """Measure one way, in a process that does nothing else."""
    subject = new_llama()
    go_on(subject, way, tokens)  # so that what is made but once is there
    size, peak = go_on(subject, way, tokens)
    return {"way": way, "tokens": tokens, "cache_bytes": size, "peak_bytes": peak}


def go_on(subject: Subject, way: str, tokens: int) -> tuple[int, int]:
    """Return the bytes of a KV cache, and the most that was taken to go on with it."""
    slots = subject.slots
    assert slots.nbytes is not None
    history, new = prompt(tokens), prompt(NEW_TOKENS)
    kept = slots.create()
    fill(kept, tokens)
    size = slots.nbytes(kept)
    if way == "session":
        with Session() as session:
            with slots.borrow(session) as state:
                state.append(history)
                state.kv_cache = kept
                state.advance(tokens)
            peak = Peak()
            with slots.borrow(session) as state:
                state.reuse_prefix([*history, *new])
            for _ in range(STEPS):
                subject.decode(session)
            return size, peak.bytes()
    peak = Peak()
    cache = copy.deepcopy(kept) if way == "deepcopy" else kept
    for _ in range(STEPS):
        new = [subject.feed(cache, new)]
    return size, peak.bytes()


def new_llama() -> Subject:
    """Return a random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_SIZE,
        intermediate_size=2 * HEADS * HEAD_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2 * TOKENS,
    )
    return transformers(LlamaForCausalLM(config))


def fill(cache: Any, tokens: int) -> None:
    """Have a KV cache cover so many tokens."""
    import torch

    for layer in range(LAYERS):
        keys, values = torch.randn(2, 1, HEADS, tokens, HEAD_SIZE)
        cache.update(keys.clone(), values.clone(), layer)


class Peak:
    """The highest resident memory of this process since now."""

    def __init__(self) -> None:
        self.before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back, says proc(5)

    def bytes(self) -> int:
        """Return the bytes that it is above what it was at first."""
        return resident("VmHWM") - self.before


def resident(name: str) -> int:
    """Return a number of bytes that the kernel keeps of this process."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def claims(records: Sequence[Record]) -> list[Claim]:
    """Tell what a copy costs."""
    copied, owned, bare = (of_its_size(record) for record in records)
    return [
        Claim(
            f"`copy.deepcopy` takes the KV cache a second time: at {records[0]['tokens']:,} tokens, it "
            f"takes {copied:.2f} times its size on top, at least {LEAST_COPY}.",
            copied >= LEAST_COPY,
        ),
        Claim(
            f"A session takes {owned:.2f} times its size, less than {MOST_OWNED}. The library needs "
            f"that for a step: the bare cache takes {bare:.2f} times its size.",
            owned < MOST_OWNED and abs(owned - bare) < NEAR,
        ),
    ]


def of_its_size(record: Record) -> float:
    """Return how many times the KV cache's size is taken on top of it."""
    return float(record["peak_bytes"] / record["cache_bytes"])


def rows(records: Sequence[Record]) -> str:
    """Tell all."""
    return table(
        ["way", "KV cache", "taken on top", "of its size"],
        [
            [
                r["way"],
                f"{r['cache_bytes'] / 2**20:.0f} MiB",
                f"{r['peak_bytes'] / 2**20:.1f} MiB",
                f"{of_its_size(r):.2f}",
            ]
            for r in records
        ],
    )


MEASUREMENT = Measurement(__doc__, measure, claims, rows)
