"""Reuse of a common prefix.

How long does it take to find out how much of a prompt is cached, and to keep that? The peers' own code runs:
`Llama.generate` up to where it would feed the model, and `LRUPromptCache.fetch_nearest_cache`, which mlx-lm's server
calls, with an empty KV cache, so that the copy it makes costs nothing here (it does below). Both take lists: a NumPy
array is made one, in the time that is shown. A session's `reuse_prefix` compares, checks the new tokens, truncates the
KV cache and replaces the history. A prompt differs from the conversation after its first 8 tokens ("start"), half-way,
or 8 tokens before the end. CPU time, a tenth percentile of rounds that take turns.
"""

# ruff: noqa: PLC0415 the page is made without these libraries
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from time import process_time
from typing import Any
from unittest.mock import patch

import numpy as np
from tests.benchmarks.comparison.page import Claim, Measurement, duration, table, times
from tests.benchmarks.comparison.records import Record
from tests.benchmarks.measuring import Measure, fastest_of

from inference_session import Session
from inference_session.engine import StateSlots


LENGTHS, QUICK_LENGTHS = (1024, 131_072), (1024, 4096)
VOCABULARY = 150_000
PEERS = ("llama-cpp-python", "mlx-lm")
KINDS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "NumPy": partial(np.array, dtype=np.int32),
}
SECONDS, QUICK_SECONDS = 0.2, 0.02
FEW = 8
LEAST_GAIN = 10


def measure(*, quick: bool) -> list[Record]:
    """Return the seconds of each, by length, place of the first token that differs, and kind of input."""
    from llama_cpp import Llama

    from smollm2 import find_weights

    llama = Llama(str(find_weights()), n_ctx=512, n_threads=1, verbose=False)
    records: list[Record] = []
    for length in QUICK_LENGTHS if quick else LENGTHS:
        for place, common in {"start": FEW, "middle": length // 2, "end": length - FEW}.items():
            history, tokens = tokens_with_prefix(length, common)
            for kind, convert in KINDS.items():
                prompt = convert(tokens)
                measures = {
                    "session": session(history, prompt, common),
                    "llama-cpp-python": llama_cpp(llama, history, prompt, common),
                    "mlx-lm": mlx_lm(history, prompt, common),
                }
                seconds = fastest_of(measures, QUICK_SECONDS if quick else SECONDS)
                records.append({"length": length, "place": place, "kind": kind, **seconds})
    return records


def tokens_with_prefix(length: int, common: int) -> tuple[list[int], list[int]]:
    """Return two lists of tokens that have a prefix in common, and nothing after it."""
    history = np.random.default_rng(0).integers(0, VOCABULARY, length)
    prompt = history.copy()
    prompt[common:] = (prompt[common:] + 1) % VOCABULARY
    return history.tolist(), prompt.tolist()


class Covered:
    """A KV cache, as far as a session can see."""

    length = 0

    def truncate(self, length: int) -> "Covered":
        """Keep the first tokens."""
        self.length = length
        return self


slots = StateSlots(create=Covered, length=lambda cache: cache.length, truncate=Covered.truncate)


def session(history: list[int], prompt: Sequence[int], common: int) -> Measure:
    """Measure `reuse_prefix`."""
    owned, cached = Session(), np.array(history, np.int32)

    def measure() -> float:
        with slots.borrow(owned) as state:
            state.reuse_prefix(cached)
            state.kv_cache.length = len(cached)
            state.advance(len(state.pending))
            start = process_time()
            reused = state.reuse_prefix(prompt)
            seconds = process_time() - start
        assert reused == common
        return seconds

    return measure


class _ReachedEvalError(Exception):
    """Ends `Llama.generate` where it would feed the model."""


def llama_cpp(llama: Any, history: list[int], prompt: Sequence[int], common: int) -> Measure:
    """Measure what `generate` does with a prompt before its first `eval`."""
    cached = np.array(history, np.intc)
    reached: list[tuple[float, int]] = []

    def stop(tokens: Sequence[int]) -> None:
        reached.append((process_time(), len(tokens)))
        raise _ReachedEvalError

    def measure() -> float:
        llama.input_ids, llama.n_tokens = cached, len(cached)
        steps = llama.generate(prompt)
        with patch.object(llama, "eval", stop):
            start = process_time()
            with suppress(_ReachedEvalError):
                next(steps)
        end, to_feed = reached.pop()
        assert to_feed == len(prompt) - common
        return end - start

    return measure


def mlx_lm(history: list[int], prompt: Any, common: int) -> Measure:
    """Measure what the server does with a prompt."""
    from mlx_lm.models.cache import KVCache, LRUPromptCache

    prompts = LRUPromptCache()
    prompts.insert_cache("model", history, [KVCache()])  # type: ignore[no-untyped-call]

    def measure() -> float:
        start = process_time()
        tokens = prompt if isinstance(prompt, list) else prompt.tolist()
        _, to_feed = prompts.fetch_nearest_cache("model", tokens)
        seconds = process_time() - start
        assert len(to_feed) == len(prompt) - common
        return seconds

    return measure


def claims(records: Sequence[Record]) -> list[Claim]:
    """Tell where a session is faster, and where it is slower."""
    longest = max(r["length"] for r in records)
    as_list, as_array = (r for r in records if (r["length"], r["place"]) == (longest, "end"))
    slower = [r for r in records if min(gain(r, peer) for peer in PEERS) < 1]
    worst = min(gain(r, peer) for r in records for peer in PEERS)
    return [
        *(
            Claim(
                f"At {longest:,} tokens that differ near the end, {peer} takes "
                f"{times(gain(as_list, peer))} times as long as a session for a list, and "
                f"{times(gain(as_array, peer))} times for a NumPy array: more for each, and for the "
                f"array at least {LEAST_GAIN} times.",
                gain(as_list, peer) > 1 and gain(as_array, peer) >= LEAST_GAIN,
            )
            for peer in PEERS
        ),
        Claim(
            "A session is slower where a long list differs at the start: llama-cpp-python has nothing to "
            "look at there, but a session checks and copies all of the prompt. At worst it takes "
            f"{times(1 / worst)} times as long. It never does where half of the tokens are reused.",
            {(r["place"], r["kind"]) for r in slower} == {("start", "list")},
            always=False,
        ),
    ]


def gain(record: Record, peer: str) -> float:
    """Return how many times as long as a session a peer takes."""
    return float(record[peer] / record["session"])


def rows(records: Sequence[Record]) -> str:
    """Tell all."""
    return table(
        ["tokens, differing, input", "session", *(f"{peer}, times that" for peer in PEERS)],
        [
            [
                f"{r['length']:,}, {r['place']}, {r['kind']}",
                duration(r["session"]),
                *(times(gain(r, peer)) for peer in PEERS),
            ]
            for r in records
        ],
    )


MEASUREMENT = Measurement(__doc__, measure, claims, rows)
