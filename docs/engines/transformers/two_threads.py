"""The fate of a KV cache stepped by two threads at once: without a session, then with one.

python docs/engines/transformers/two_threads.py
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from threading import Barrier, Thread
from typing import Any, cast

import torch
from transformers import DynamicCache

from inference_session import Session
from inference_session.exceptions import SessionBusyError
from transformers_engine import TransformersEngine, random_llama


TRIALS = 40

torch.set_num_threads(1)
MODEL = random_llama(0)
PROMPT: list[int] = torch.randint(128, (30,), generator=torch.Generator().manual_seed(1)).tolist()


@torch.no_grad()
def feed(cache: DynamicCache, tokens: Sequence[int]) -> None:
    """Feed some tokens to a cache."""
    MODEL(input_ids=torch.tensor([tokens]), past_key_values=cache)


def filled(*tokens: int) -> DynamicCache:
    """Return a cache of the prompt and some more tokens."""
    cache = DynamicCache(config=MODEL.config)
    feed(cache, PROMPT)
    for token in tokens:
        feed(cache, [token])
    return cache


def same(one: DynamicCache, other: DynamicCache) -> bool:
    """Whether two caches hold the same numbers in all layers."""
    return all(
        a.shape == b.shape and torch.allclose(a, b)
        for a, b in zip(tensors(one), tensors(other), strict=True)
    )


def tensors(cache: DynamicCache) -> list[torch.Tensor]:
    """Return the keys and values of all layers."""
    layers = cast("list[Any]", cache.layers)
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


def at_once(*steps: Callable[[], object]) -> list[Exception]:
    """Do some steps in a thread each, all at once; return their exceptions."""
    raised: list[Exception] = []
    start = Barrier(len(steps))

    def run(step: Callable[[], object]) -> None:
        start.wait()
        try:
            step()
        except Exception as error:  # noqa: BLE001
            raised.append(error)

    threads = [Thread(target=run, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def without_a_session() -> None:
    """Feed a cache two tokens by two threads; one would expect them in either order."""
    in_order = [filled(5, 9), filled(9, 5)]
    corrupt, raised = 0, 0
    for _ in range(TRIALS):
        cache = filled()
        raised += len(at_once(partial(feed, cache, [5]), partial(feed, cache, [9])))
        corrupt += not any(same(cache, expected) for expected in in_order)
    print(f"  corrupt afterwards: {corrupt} of {TRIALS} caches; exceptions: {raised}")
    assert corrupt > 0


def with_a_session() -> None:
    """Decode a session by two threads."""
    engine = TransformersEngine(MODEL)
    with Session() as session:
        engine.prefill(session, PROMPT)
        expected = engine.generate(session, 2)

    busy, right = 0, 0
    for _ in range(TRIALS):
        with Session() as session:
            engine.prefill(session, PROMPT)
            raised = at_once(*[partial(engine.decode, session)] * 2)
            assert all(isinstance(error, SessionBusyError) for error in raised)
            assert len(raised) < 2
            busy += len(raised)
            for _ in raised:
                engine.decode(session)  # The refused one tries again.
            with engine.slots.borrow(session) as state:
                tokens = state.token_history == PROMPT + expected
                cache = cast("DynamicCache", state.kv_cache)
                right += tokens and same(cache, filled(expected[0]))
    print(f"  right afterwards: {right} of {TRIALS} sessions")
    print(
        f"  refused a thread by SessionBusyError: {busy} of them (in the others they didn't meet)"
    )
    assert right == TRIALS
    assert busy > 0


if __name__ == "__main__":
    print("Two threads step one KV cache, without a session")
    without_a_session()
    print("With a session")
    with_a_session()
