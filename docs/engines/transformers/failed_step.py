"""The fate of a KV cache when a step fails half-way: without a session, then with one.

python docs/engines/transformers/failed_step.py
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from typing import cast

import torch
from transformers import DynamicCache

from inference_session import Session
from transformers_engine import TransformersEngine, random_llama


torch.set_num_threads(1)
torch.set_grad_enabled(False)
MODEL = random_llama(0)
PROMPT: list[int] = torch.randint(128, (10,), generator=torch.Generator().manual_seed(1)).tolist()
TOO_MUCH, NEXT = [5, 17, 3], 99


@contextmanager
def no_memory_in_the_third_layer() -> Generator[None]:
    """Let the model run out of memory half-way."""

    def fail(*_: object) -> None:
        raise MemoryError

    with MODEL.model.layers[2].register_forward_pre_hook(fail):
        yield


def feed(cache: DynamicCache, tokens: Sequence[int]) -> int:
    """Feed some tokens; return the likeliest next one."""
    logits = MODEL(input_ids=torch.tensor([tokens]), past_key_values=cache).logits
    return int(logits[0, -1].argmax())


def answer(cache: DynamicCache, token: int) -> list[int]:
    """Feed one more token, and return the next eight."""
    tokens = [token]
    for _ in range(8):
        tokens.append(feed(cache, tokens[-1:]))
    return tokens[1:]


def covered(cache: DynamicCache) -> list[int]:
    """Return how many tokens each layer covers."""
    return [cache.get_seq_length(layer) for layer in range(len(cache.layers))]


def right_answer() -> list[int]:
    """Return the answer without a failure."""
    cache = DynamicCache(config=MODEL.config)
    feed(cache, PROMPT)
    return answer(cache, NEXT)


def without_a_session() -> None:
    """Fail to feed three tokens, and go on with another."""
    cache = DynamicCache(config=MODEL.config)
    feed(cache, PROMPT)
    with suppress(MemoryError), no_memory_in_the_third_layer():
        feed(cache, TOO_MUCH)
    print(f"  the layers cover {covered(cache)} tokens; the cache says {cache.get_seq_length()}")
    assert covered(cache) == [13, 13, 10, 10]
    right = answer(cache, NEXT) == right_answer()
    print(f"  the next step raises nothing; the answer is right: {right}")
    assert not right


def with_a_session() -> None:
    """Do the same with a session."""
    engine = TransformersEngine(MODEL)
    with Session() as session:
        engine.prefill(session, PROMPT)
        with suppress(MemoryError), no_memory_in_the_third_layer():
            engine.prefill(session, TOO_MUCH)
        with engine.slots.borrow(session) as state:
            cache = covered(cast("DynamicCache", state.kv_cache))
            tokens = len(state.token_history)
        # The last token of a session waits for the next step.
        print(f"  the layers cover {cache} tokens, of {tokens} in the session")
        engine.prefill(session, [NEXT])
        right = engine.generate(session, 8) == right_answer()
    print(f"  the next step raises nothing; the answer is right: {right}")
    assert (cache, tokens, right) == ([9, 9, 9, 9], 10, True)


if __name__ == "__main__":
    print("A step runs out of memory half-way, without a session")
    without_a_session()
    print("With a session")
    with_a_session()
