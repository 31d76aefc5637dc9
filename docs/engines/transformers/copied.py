"""The fate of a KV cache kept for later: first without a session, then with one.

python docs/engines/transformers/copied.py
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import DynamicCache

from inference_session import Session
from transformers_engine import TransformersEngine, length, nbytes, random_llama


torch.set_num_threads(1)
torch.set_grad_enabled(False)
MODEL = random_llama(0)
SYSTEM: list[int] = torch.randint(128, (13,), generator=torch.Generator().manual_seed(1)).tolist()
FIRST, SECOND = [5, 17, 3, 99, 42], [8, 61, 70, 2, 11]  # Questions of two users.


def generate(prompt: Sequence[int], cache: DynamicCache | None = None) -> list[int]:
    """Return the next seven tokens after a prompt; tokens in the cache are not fed again."""
    ids = torch.tensor([prompt])
    output = cast("Any", MODEL).generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=7
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def new_cache() -> DynamicCache:
    """Return a cache of the system prompt, for all conversations to start from."""
    cache = DynamicCache(config=MODEL.config)
    MODEL(input_ids=torch.tensor([SYSTEM]), past_key_values=cache)
    return cache


def without_a_session() -> None:
    """Keep the cache of a system prompt, and start two conversations from it."""
    kept = new_cache()
    before = length(kept)
    first = generate(SYSTEM + FIRST, kept)
    print(f"  used as it is: covers {before} tokens, and after an answer {length(kept)}")
    assert first == generate(SYSTEM + FIRST)
    second = generate(SYSTEM + SECOND, kept)
    print(f"    the next answer from it is right: {second == generate(SYSTEM + SECOND)}")
    assert (before, second == generate(SYSTEM + SECOND)) == (13, False)

    kept = new_cache()
    generate(SYSTEM + FIRST, copy.copy(kept))
    print(f"  copy.copy: the original covers {before} tokens, and after an answer {length(kept)}")
    second = generate(SYSTEM + SECOND, copy.copy(kept))
    print(f"    the next answer from it is right: {second == generate(SYSTEM + SECOND)}")
    assert second != generate(SYSTEM + SECOND)

    kept = new_cache()
    twin = copy.deepcopy(kept)
    print(f"  copy.deepcopy: {nbytes(kept):,} bytes, and {nbytes(kept) + nbytes(twin):,} with it")
    assert generate(SYSTEM + SECOND, twin) == generate(SYSTEM + SECOND)


def with_a_session() -> None:
    """Start a conversation in a session, and ask it something else."""
    engine = TransformersEngine(MODEL)
    with Session() as session:
        engine.prefill(session, SYSTEM + FIRST)
        for duplicate in copy.copy, copy.deepcopy, pickle.dumps:
            try:
                duplicate(session)
            except TypeError:
                print(f"  {duplicate.__module__}.{duplicate.__name__}: TypeError".replace("_", ""))
            else:
                raise AssertionError
        assert engine.generate(session, 7) == generate(SYSTEM + FIRST)
        reused = engine.prompt(session, SYSTEM + SECOND)
        second = engine.generate(session, 7)
    right = second == generate(SYSTEM + SECOND)
    print(f"  another question: {reused} tokens of the cache are reused, and the rest is cut off")
    print(f"    the answer is right: {right}")
    assert (reused, right) == (len(SYSTEM), True)


if __name__ == "__main__":
    print("A KV cache of 13 tokens is kept for later, without a session")
    without_a_session()
    print("With a session")
    with_a_session()
