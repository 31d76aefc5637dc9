"""The kit on a real engine: the Llama in NumPy keeps all promises."""

from __future__ import annotations

from collections.abc import Callable

from inference_session.testing import parametrize_with_checks
from llama_model import KVCache, Llama, random_model
from numpy_llama import LlamaEngine


MODEL = random_model(0)


@parametrize_with_checks(
    lambda: LlamaEngine(MODEL, chunk=4),
    vocab_size=128,
    held=lambda engine: engine.memory.used,
    fail_in=[(Llama, "logits"), (KVCache, "write")],
)
def test_engine(check: Callable[[], None]) -> None:
    """The engine keeps a promise."""
    check()
