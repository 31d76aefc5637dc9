"""Models of several libraries, called without an engine, and a decode step in a session."""

# ruff: noqa: PLC0415 no process imports more of these libraries than it measures
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from attrs import frozen

from inference_session import Session
from inference_session.engine import StateSlots


VOCABULARY = 128
"""How many tokens a random model knows."""
CONTEXT = 8192


@frozen
class Subject:
    """A model, and what a session is told of its KV caches."""

    slots: StateSlots[Any]
    feed: Callable[[Any, Sequence[int]], int]
    """Feeds a KV cache its next tokens; returns the likeliest token to follow."""

    def decode(self, session: Session) -> int:
        """Do a decode step, as in the README."""
        with self.slots.borrow(session) as state:
            fed = state.pending
            token = self.feed(state.kv_cache, fed)
            state.advance(len(fed))
            state.append([token])
        return token


def prompt(length: int) -> list[int]:
    """Return tokens that every model knows."""
    tokens: list[int] = np.random.default_rng(1).integers(3, VOCABULARY, length).tolist()
    return tokens


def numpy_random() -> Subject:
    """Return a random model in NumPy."""
    from llama_model import random_model

    return _numpy(random_model(0, vocab_size=VOCABULARY, context_length=CONTEXT))


def numpy_smollm2() -> Subject:
    """Return a trained model in NumPy."""
    from smollm2 import find_weights, load

    return _numpy(load(find_weights())[0])


def _numpy(model: Any) -> Subject:
    from numpy_llama import LlamaEngine

    def feed(cache: Any, tokens: Sequence[int]) -> int:
        hidden = model.forward([(cache, np.asarray(tokens, np.int32))])
        return int(model.logits(hidden)[0].argmax())

    return Subject(LlamaEngine(model).slots, feed)


def transformers_random() -> Subject:
    """Return a random model of transformers."""
    from docs.engines.transformers.transformers_engine import random_llama

    model = random_llama(0, vocab_size=VOCABULARY)
    model.config.max_position_embeddings = CONTEXT
    return transformers(model)


def transformers(model: Any) -> Subject:
    """Return a Llama of transformers."""
    import torch
    from docs.engines.transformers.transformers_engine import TransformersEngine

    torch.set_num_threads(1)

    @torch.no_grad()
    def feed(cache: Any, tokens: Sequence[int]) -> int:
        ids = torch.tensor([tokens])
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())

    return Subject(TransformersEngine(model).slots, feed)


def llama_cpp_smollm2() -> Subject:
    """Return a trained model in llama.cpp."""
    from docs.engines.llama_cpp.llama_cpp_engine import LlamaContext, LlamaCppEngine

    from smollm2 import find_weights

    context = LlamaContext(find_weights(), n_threads=1)

    def feed(sequence: Any, tokens: Sequence[int]) -> int:
        (logits,) = context.feed([(sequence, tokens)])
        return int(logits.argmax())

    return Subject(LlamaCppEngine(context).slots, feed)


SUBJECTS: dict[tuple[str, str], Callable[[], Subject]] = {
    ("NumPy", "random"): numpy_random,
    ("transformers", "random"): transformers_random,
    ("llama.cpp", "SmolLM2-135M"): llama_cpp_smollm2,
    ("NumPy", "SmolLM2-135M"): numpy_smollm2,
}
