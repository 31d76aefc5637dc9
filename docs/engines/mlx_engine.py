"""An engine over MLX, with a model and KV caches of mlx-lm.

A KV cache is a list with one of mlx-lm's caches for each layer, changed in place. MLX computes when
it must, not when it is told what; so a step isn't over before it is evaluated.
"""

# MLX and mlx-lm are typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import threading
from collections.abc import Sequence
from operator import index
from typing import Protocol, cast

from inference_session import Session
from inference_session.engine import BorrowedState, DecodeResult, PrefillResult, StateSlots
from inference_session.exceptions import SessionClosedError


try:
    import mlx.core as mx
    from mlx.utils import tree_map_with_path
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.models.llama import Model, ModelArgs
except ModuleNotFoundError as error:
    msg = (
        "no MLX: install it with `pip install 'mlx[cpu]==0.32.4' mlx-lm==0.32.2` (on a Mac, `mlx`)"
    )
    raise ImportError(msg) from error


class LayerCache(Protocol):
    """What is needed of mlx-lm's cache of a layer."""

    offset: int
    """Tokens it covers."""

    @property
    def state(self) -> object:
        """The arrays in it."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        ...

    def trim(self, n: int) -> int:
        """Forget the last n tokens, or as many as there are."""
        ...


LayerCaches = list[LayerCache]


def length(caches: LayerCaches) -> int:
    """Return how many tokens the caches of all layers cover; `RuntimeError` if they disagree."""
    lengths = {cache.offset for cache in caches}
    if len(lengths) != 1:
        msg = "the layers of a KV cache cover different numbers of tokens"
        raise RuntimeError(msg)
    return lengths.pop()


def truncate(caches: LayerCaches, length: int) -> LayerCaches:
    """Keep the first `length` tokens in all layers; `ValueError` if one has fewer."""
    excess = [cache.offset - length for cache in caches]
    if min(excess) < 0:  # `trim` would trim less, or "trim" a negative number, and say nothing.
        msg = f"cannot truncate a KV cache to {length} tokens, as it has fewer"
        raise ValueError(msg)
    for cache, count in zip(caches, excess, strict=True):
        cache.trim(count)
    return caches


class MLXEngine:
    """An `inference_session.engine.Engine`.

    Every call feeds all that is pending, whyever it is, and leaves the last token of a session
    pending, so that there is something to decode from.
    """

    def __init__(self, model: Model, *, chunk: int = 512) -> None:
        """Serve `model`; `chunk` is the most tokens of a session that go through it at once."""
        self.model = model
        self.chunk = chunk
        self.slots = StateSlots(
            create=lambda: make_prompt_cache(model),
            length=length,
            truncate=truncate,
            nbytes=lambda caches: sum(cache.nbytes for cache in caches),
        )
        # A stream of MLX is its thread's, but a session is anybody's: what one thread left
        # unevaluated, another must be able to evaluate. This kind can do that, but takes a lock.
        self._stream = mx.new_thread_unsafe_stream(mx.default_device())
        self._lock = threading.Lock()

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Add tokens and fill the KV cache with all but the last."""
        new = self._check(tokens)
        with self.slots.borrow(session) as state:
            state.append(new)
            self._feed_all_but_last(session, state)
        return PrefillResult(tokens_processed=len(new))

    def prompt(self, session: Session, tokens: Sequence[int], /) -> int:
        """Make `tokens` the whole history; return how many of them the KV cache had already."""
        history = self._check(tokens)
        with self.slots.borrow(session) as state:
            reused = state.reuse_prefix(history)
            self._feed_all_but_last(session, state)
        return reused

    def decode(self, session: Session, /) -> DecodeResult:
        """Add the likeliest next token."""
        with self.slots.borrow(session) as state:
            if not state.token_history:
                msg = "nothing to decode from: the session is empty, prefill it first"
                raise ValueError(msg)
            self._feed_all_but_last(session, state)
            token = self._feed(state.kv_cache, state.pending)
            state.advance(1)
            state.append([token])
        return DecodeResult(token=token)

    def _feed_all_but_last(self, session: Session, state: BorrowedState[LayerCaches]) -> None:
        pending = state.pending[:-1]
        for start in range(0, len(pending), self.chunk):
            if session.closed:  # Nobody waits for the rest.
                raise SessionClosedError(session.id)
            tokens = pending[start : start + self.chunk]
            self._feed(state.kv_cache, tokens)
            state.advance(len(tokens))

    def _feed(self, caches: LayerCaches, tokens: Sequence[int]) -> int:
        """Feed the next tokens, and return the likeliest to follow them."""
        with self._lock, mx.stream(self._stream):
            logits = self.model(mx.array([tokens]), cache=caches)[0, -1]
            token = mx.argmax(logits)
            # Here, and not in a later step or borrow, is where memory runs out or Ctrl-C strikes.
            mx.eval(token, [cache.state for cache in caches])
            return cast("int", token.item())

    def _check(self, tokens: Sequence[int]) -> list[int]:
        ids = [index(token) for token in tokens]
        size = self.model.args.vocab_size
        for place, token in enumerate(ids):
            if not 0 <= token < size:  # MLX would take any number.
                msg = f"token {place} (from 0) isn't in the vocabulary of {size}"
                raise ValueError(msg)
        return ids


def random_model(seed: int, *, vocab_size: int = 128, num_layers: int = 3) -> Model:
    """Return a small Llama with random weights, to test with.

    They are large enough for every token of the input, and what every layer has cached of it, to
    show in the output; and an embedding that also makes the output would have it echo its input.
    """
    args = ModelArgs(
        model_type="llama",
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=num_layers,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_theta=100.0,
        tie_word_embeddings=False,
    )
    model = Model(args)
    keys = iter(mx.random.split(mx.random.key(seed), 100))

    def weights(name: str, array: mx.array) -> mx.array:
        if array.ndim == 1:  # A norm's, which are 1.
            return array
        gain = 3.0 if "o_proj" in name or "lm_head" in name else 1.5
        scale = 1.0 if "embed" in name else gain * array.shape[1] ** -0.5
        return scale * mx.random.normal(array.shape, key=next(keys))

    model.update(tree_map_with_path(weights, model.parameters()))
    mx.eval(model.parameters())
    return model
