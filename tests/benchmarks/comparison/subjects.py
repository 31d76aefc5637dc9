"""The engines of the documentation over small models, and how each model is called without an engine."""

# ruff: noqa: PLC0415 no process imports more of these libraries than it measures
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from attrs import frozen

from inference_session.engine import Engine, StateSlots


VOCABULARY = 128
"""How many tokens a random model knows."""
CONTEXT = 8192


@frozen
class Subject:
    """An engine, and what it does with a KV cache.

    Libraries are imported where they are needed, as no process should hold more than one of them.
    """

    engine: Engine
    slots: StateSlots[Any]
    feed: Callable[[Any, Sequence[int]], tuple[Any, int]]
    """Feeds a KV cache its next tokens; returns what it is then, and the likeliest token to follow."""
    model_calls: Sequence[tuple[Any, str]]
    """The functions that are the model, each by its owner and its name."""
    evaluate: Callable[[Any], object] = lambda result: None
    """Waits for a result of the model, where it is computed behind the caller's back."""
    functional: bool = False
    """Whether a step returns another KV cache, instead of changing the one that it is given."""
    half_way: tuple[Any, str] | None = None
    """A function that is called when a part of the tokens' keys and values is in the KV cache."""


def prompt(length: int) -> list[int]:
    """Return tokens that every model knows."""
    tokens: list[int] = np.random.default_rng(1).integers(3, VOCABULARY, length).tolist()
    return tokens


def numpy_random() -> Subject:
    """Return the NumPy engine with a random model."""
    from llama_model import random_model

    return _numpy(random_model(0, vocab_size=VOCABULARY, context_length=CONTEXT))


def numpy_smollm2() -> Subject:
    """Return the NumPy engine with a trained model."""
    from smollm2 import find_weights, load

    return _numpy(load(find_weights())[0])


def _numpy(model: Any) -> Subject:
    from llama_model import Llama
    from numpy_llama import LlamaEngine

    def feed(cache: Any, tokens: Sequence[int]) -> tuple[Any, int]:
        hidden = model.forward([(cache, np.asarray(tokens, np.int32))])
        return cache, int(model.logits(hidden)[0].argmax())

    engine = LlamaEngine(model)
    calls = [(Llama, "forward"), (Llama, "logits")]
    return Subject(engine, engine.slots, feed, calls, half_way=(Llama, "logits"))


def transformers_random() -> Subject:
    """Return the engine over transformers with a random model."""
    from docs.engines.transformers.transformers_engine import random_llama

    model = random_llama(0, vocab_size=VOCABULARY)
    model.config.max_position_embeddings = CONTEXT
    return transformers(model)


def transformers(model: Any) -> Subject:
    """Return the engine over transformers with a Llama of theirs."""
    import torch
    from docs.engines.transformers.transformers_engine import TransformersEngine
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)

    @torch.no_grad()
    def feed(cache: Any, tokens: Sequence[int]) -> tuple[Any, int]:
        ids = torch.tensor([tokens])
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache, int(output.logits[0, -1].argmax())

    engine = TransformersEngine(model)
    half_way = (model.model.layers[len(model.model.layers) // 2], "forward")
    return Subject(engine, engine.slots, feed, [(LlamaForCausalLM, "forward")], half_way=half_way)


def llama_cpp_smollm2() -> Subject:
    """Return the engine over llama.cpp with a trained model."""
    import llama_cpp
    from docs.engines.llama_cpp.llama_cpp_engine import LlamaContext, LlamaCppEngine

    from smollm2 import find_weights

    context = LlamaContext(find_weights(), n_threads=1)

    def feed(sequence: Any, tokens: Sequence[int]) -> tuple[Any, int]:
        (logits,) = context.feed([(sequence, tokens)])
        return sequence, int(logits.argmax())

    engine = LlamaCppEngine(context)
    return Subject(engine, engine.slots, feed, [(llama_cpp, "llama_decode")])


def mlx_random() -> Subject:
    """Return the engine over MLX with a random model."""
    from docs.engines.mlx.mlx_engine import random_model

    return mlx(random_model(0, vocab_size=VOCABULARY))


def mlx(model: Any) -> Subject:
    """Return the engine over MLX with a Llama of mlx-lm."""
    import mlx.core as mx
    from docs.engines.mlx.mlx_engine import MLXEngine
    from mlx_lm.models.llama import Model

    engine = MLXEngine(model)

    def feed(caches: Any, tokens: Sequence[int]) -> tuple[Any, int]:
        return caches, engine._feed(caches, tokens)[-1]

    return Subject(engine, engine.slots, feed, [(Model, "__call__")], mx.eval)


def jax_random() -> Subject:
    """Return the engine in JAX with a random model."""
    import jax
    import jax.numpy as jnp

    import jax_engine

    model = jax_engine.random_model(0, vocab_size=VOCABULARY)
    engine = jax_engine.JaxEngine(model)

    def feed(cache: Any, tokens: Sequence[int]) -> tuple[Any, int]:
        count = len(tokens)
        places = 1 if count == 1 else engine.chunk
        padded = jnp.array([*tokens, *[0] * (places - count)])
        logits, keys, values = jax_engine.forward(model, cache, padded, count)
        return jax_engine.KVCache(keys, values, cache.length + count), int(logits.argmax())

    calls = [(jax_engine, "forward")]
    return Subject(engine, engine.slots, feed, calls, jax.block_until_ready, functional=True)


SUBJECTS: dict[tuple[str, str], Callable[[], Subject]] = {
    ("NumPy", "random"): numpy_random,
    ("JAX", "random"): jax_random,
    ("MLX", "random"): mlx_random,
    ("transformers", "random"): transformers_random,
    ("llama.cpp", "SmolLM2-135M"): llama_cpp_smollm2,
    ("NumPy", "SmolLM2-135M"): numpy_smollm2,
}
