"""How much memory it takes at most to go on with a conversation whose KV cache is kept.

The peers' way is to copy the cache that is kept, as whoever went on in it would change it for all others: transformers'
documentation does it by `copy.deepcopy`, and so does mlx-lm's server with every hit. A session is borrowed, and gone on
in. The bare cache gone on in, with nothing to protect it, is the least that either can take.

The process is asked for what it takes: the highest resident memory while the conversation goes on, less that before.
Every way has a process of its own, in which the memory allocator is told to give large blocks back at once, so that a
copy can't hide in what was freed before. The KV cache is filled with random numbers, not by a model, whose own memory
would be in the way; what goes on is the real model, fed a short prompt and then a token at a time.
"""

# ruff: noqa: PLC0415 no process imports more of these libraries than it measures
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import copy
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.benchmarks.comparison import subjects
from tests.benchmarks.comparison.records import Record, alone
from tests.benchmarks.comparison.subjects import VOCABULARY, Subject, prompt

from inference_session import Session


LENGTHS, QUICK_LENGTHS = (1000, 4000, 16_000), (1000,)
LAYERS, HEADS, HEAD_SIZE = 8, 8, 32
NEW_TOKENS, STEPS = 8, 2
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
WAYS = ("deepcopy", "session", "bare cache")

Fill = Callable[[Any, int], object]
"""Has a KV cache cover so many tokens."""


def measure(*, quick: bool) -> list[Record]:
    """Return the bytes of a KV cache, and those taken to go on with it, by library, way and tokens."""
    lengths = QUICK_LENGTHS if quick else LENGTHS
    with patch.dict(os.environ, GIVE_BACK):
        return [
            record
            for peer in PEERS
            for way in WAYS
            for record in alone(measure_way, peer, way, lengths)
        ]


def measure_way(peer: str, way: str, lengths: tuple[int, ...]) -> list[Record]:
    """Measure one way, in a process that does nothing else."""
    subject, fill = PEERS[peer]()
    records: list[Record] = []
    for length in lengths:
        go_on(subject, fill, way, length)  # so that what is made but once is there
        size, peak = go_on(subject, fill, way, length)
        records.append(
            {"peer": peer, "way": way, "tokens": length, "cache_bytes": size, "peak_bytes": peak}
        )
    return records


def go_on(subject: Subject, fill: Fill, way: str, length: int) -> tuple[int, int]:
    """Return the bytes of a KV cache, and the most that was taken to go on with it."""
    slots = subject.slots
    assert slots.nbytes is not None
    history, new = prompt(length), prompt(NEW_TOKENS)
    if way == "session":
        with Session() as session, slots.borrow(session) as state:
            state.append(history)
            fill(state.kv_cache, length)
            state.advance(length)
            size, peak = slots.nbytes(state.kv_cache), Peak()
            state.reuse_prefix([*history, *new])
            for _ in range(1 + STEPS):
                fed = state.pending
                _, token = subject.feed(state.kv_cache, fed)
                state.advance(len(fed))
                state.append([token])
            return size, peak.bytes()
    kept = slots.create()
    fill(kept, length)
    size, peak = slots.nbytes(kept), Peak()
    cache = copy.deepcopy(kept) if way == "deepcopy" else kept
    for _ in range(1 + STEPS):
        _, token = subject.feed(cache, new)
        new = [token]
    return size, peak.bytes()


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


def transformers_llama() -> tuple[Subject, Fill]:
    """Return a Llama of transformers, and how to fill its KV cache."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_SIZE,
        intermediate_size=2 * HEADS * HEAD_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2 * max(LENGTHS),
    )

    def fill(cache: Any, length: int) -> None:
        for layer in range(LAYERS):
            keys, values = torch.randn(2, 1, HEADS, length, HEAD_SIZE)
            cache.update(keys.clone(), values.clone(), layer)

    return subjects.transformers(LlamaForCausalLM(config)), fill


def mlx_llama() -> tuple[Subject, Fill]:
    """Return a Llama of mlx-lm, and how to fill its KV cache."""
    import mlx.core as mx
    from mlx_lm.models.llama import Model, ModelArgs

    model = Model(
        ModelArgs(
            model_type="llama",
            hidden_size=HEADS * HEAD_SIZE,
            num_hidden_layers=LAYERS,
            intermediate_size=2 * HEADS * HEAD_SIZE,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            rms_norm_eps=1e-5,
            vocab_size=VOCABULARY,
            tie_word_embeddings=False,
        )
    )
    mx.eval(model.parameters())

    def fill(cache: Any, length: int) -> None:
        with cache.step(length):
            for layer in cache.layers:
                keys, values = (mx.random.normal((1, HEADS, length, HEAD_SIZE)) for _ in range(2))
                mx.eval(layer.update_and_fetch(keys, values))
        mx.clear_cache()  # MLX keeps freed memory for itself, too

    return subjects.mlx(model), fill


PEERS = {"transformers": transformers_llama, "mlx-lm": mlx_llama}
