"""How long it takes to find out what of a prompt is cached already: a session, llama-cpp-python and mlx-lm.

What runs is the peers' own code, up to where they would feed the model: `Llama.generate` to its first `eval`, and
`LRUPromptCache.fetch_nearest_cache` with a KV cache that holds nothing, so that the copy it makes of it costs nothing.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from time import process_time
from typing import Any
from unittest.mock import patch

import numpy as np
from llama_cpp import Llama
from mlx_lm.models.cache import KVCache, LRUPromptCache
from tests.benchmarks.comparison.records import Record
from tests.benchmarks.measuring import Measure, fastest_of, timed

from inference_session import Session
from inference_session.engine import StateSlots
from smollm2 import find_weights


LENGTHS = (1024, 8192, 32_768, 131_072)
QUICK_LENGTHS = (1024, 4096)
VOCABULARY = 150_000
SUBJECTS = ("session", "llama-cpp-python", "mlx-lm")
FEW = 8
"""Tokens before the first that differs, where that is at the start; and after it, where it is near the end."""

KINDS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "array": partial(array, "i"),
    "NumPy": partial(np.array, dtype=np.int32),
}
SECONDS, QUICK_SECONDS = 0.2, 0.02


def measure(*, quick: bool) -> list[Record]:
    """Return the seconds of each, by length, place of the first token that differs, and kind of input."""
    llama = Llama(str(find_weights()), n_ctx=512, n_threads=1, verbose=False)
    records: list[Record] = []
    for length in QUICK_LENGTHS if quick else LENGTHS:
        for place, common in {"start": FEW, "middle": length // 2, "end": length - FEW}.items():
            history, as_list = tokens_with_prefix(length, common)
            prompts = {kind: convert(as_list) for kind, convert in KINDS.items()}
            measures = {("mlx-lm", "list"): mlx_lm(history, as_list, common)}
            for kind, prompt in prompts.items():
                measures["session", kind] = session(history, prompt, common)
                measures["llama-cpp-python", kind] = llama_cpp(llama, history, prompt, common)
                if kind != "list":
                    measures["to list", kind] = timed(partial(to_list, prompt), 1)
            found = fastest_of(measures, QUICK_SECONDS if quick else SECONDS)
            for kind in KINDS:
                # It takes a list: what isn't one is made one first. Its search is too slow to be measured thrice.
                found["mlx-lm", kind] = found["mlx-lm", "list"] + found.get(("to list", kind), 0)
            records += [
                {
                    "length": length,
                    "place": place,
                    "kind": kind,
                    "subject": subject,
                    "seconds": found[subject, kind],
                }
                for kind in KINDS
                for subject in SUBJECTS
            ]
    return records


def to_list(prompt: Any, _: int) -> list[int]:
    """Make a list of what has a method for it."""
    tokens: list[int] = prompt.tolist()
    return tokens


def tokens_with_prefix(length: int, common: int) -> tuple[list[int], list[int]]:
    """Return two lists of tokens that have a prefix in common, and nothing after it."""
    history = np.random.default_rng(0).integers(0, VOCABULARY, length)
    prompt = history.copy()
    prompt[common:] = (prompt[common:] + 1) % VOCABULARY
    return history.tolist(), prompt.tolist()


class Covered:
    """A KV cache, as far as a session can see."""

    __slots__ = ("length",)

    def __init__(self) -> None:
        self.length = 0

    def truncate(self, length: int) -> "Covered":
        """Keep the first tokens."""
        self.length = length
        return self


slots = StateSlots(create=Covered, length=lambda cache: cache.length, truncate=Covered.truncate)


def session(history: list[int], prompt: Sequence[int], common: int) -> Measure:
    """Measure `reuse_prefix`."""
    owned, cached = Session(), array("i", history)

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


def llama_cpp(llama: Llama, history: list[int], prompt: Sequence[int], common: int) -> Measure:
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


def mlx_lm(history: list[int], prompt: list[int], common: int) -> Measure:
    """Measure what the server does with a prompt."""
    prompts = LRUPromptCache()
    prompts.insert_cache("model", history, [KVCache()])  # type: ignore[no-untyped-call]

    def measure() -> float:
        start = process_time()
        _, to_feed = prompts.fetch_nearest_cache("model", prompt)
        seconds = process_time() - start
        assert len(to_feed) == len(prompt) - common
        return seconds

    return measure
