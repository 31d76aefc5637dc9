"""An engine in JAX, with immutable KV caches: each step returns a new one.

pip install jax==0.10.2
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from operator import index
from struct import Struct
from typing import BinaryIO, NamedTuple

from inference_session import Session
from inference_session.engine import BorrowedState, DecodeResult, PrefillResult, StateSlots


try:
    import jax
    import jax.numpy as jnp
    import numpy as np
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"no {error.name}: install it with `pip install jax==0.10.2`", name=error.name
    ) from error


# The model, a small Llama. Shapes: V vocabulary, L layers, H heads of d numbers, D = H d hidden
# size, F feed-forward size, C capacity of a cache, n tokens fed at once.


class Model(NamedTuple):
    """The weights; each array stacks those of all layers."""

    embedding: jax.Array
    """(V, D)"""
    query_key_value: jax.Array
    """(L, D, 3, H, d)"""
    attention_output: jax.Array
    """(L, H, d, D)"""
    up: jax.Array
    """(L, D, F)"""
    down: jax.Array
    """(L, F, D)"""
    output: jax.Array
    """(D, V)"""


Layer = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]
"""Keys, values and the four weights of one layer."""


class KVCache(NamedTuple):
    """Keys and values (L, C, H, d), and how many of the C places are taken."""

    keys: jax.Array
    values: jax.Array
    length: int

    def truncate(self, length: int) -> KVCache:
        """Return a cache of at most the first `length` tokens, with the same arrays."""
        return self._replace(length=min(self.length, length))


@jax.jit
def forward(
    model: Model, cache: KVCache, tokens: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Feed the first `count` of some tokens (n,), after those covered by the cache.

    Returns the logits (V,) after the last, and new keys and values. It is compiled for each n, not
    for each length: tokens after `count` are written as well, to places that are never read before
    they are overwritten. The old arrays stay valid, so they must not be donated (`donate_argnums`).
    """
    keys, values, start = cache
    positions = start + jnp.arange(len(tokens))
    seen = jnp.arange(keys.shape[1]) <= positions[:, None]  # (n, C)

    def layer(x: jax.Array, at: Layer) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        keys, values, query_key_value, attention_output, up, down = at
        query, key, value = jnp.einsum("nD,DxHd->xnHd", _norm(x), query_key_value)
        keys = jax.lax.dynamic_update_slice_in_dim(keys, _turn(key, positions), start, 0)
        values = jax.lax.dynamic_update_slice_in_dim(values, value, start, 0)
        scores = jnp.einsum("nHd,CHd->HnC", _turn(query, positions), keys) / keys.shape[-1] ** 0.5
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        x += jnp.einsum("HnC,CHd,HdD->nD", weights, values, attention_output)
        return x + jax.nn.silu(_norm(x) @ up) @ down, (keys, values)

    layers = keys, values, model.query_key_value, model.attention_output, model.up, model.down
    x, (keys, values) = jax.lax.scan(layer, model.embedding[tokens], layers)
    return _norm(x[count - 1]) @ model.output, keys, values


def _norm(x: jax.Array) -> jax.Array:
    return x / jnp.sqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-5)


def _turn(heads: jax.Array, positions: jax.Array) -> jax.Array:
    """Apply the rotary embedding to (n, H, d)."""
    one, two = jnp.split(heads, 2, axis=-1)
    angles = positions[:, None, None] * 100.0 ** -jnp.linspace(0, 1, one.shape[-1])
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)


# The engine

_LENGTH = Struct("<Q")  # In a file, before the keys and the values.


class JaxEngine:
    """An `inference_session.engine.Engine`: any number of sessions, sharing a model.

    Between calls the last token of a session is pending, to compute the next one from; if it isn't,
    `decode` feeds it again. Every call feeds all pending tokens, for whatever reason they are
    pending, is atomic, and can raise the errors of `StateSlots.borrow`.
    """

    def __init__(self, model: Model, *, context_length: int = 512, chunk: int = 64) -> None:
        """Serve `model`; tokens go through it one by one or by `chunk`."""
        self.model = model
        self.context_length = context_length
        self.chunk = chunk
        self.slots = StateSlots(
            create=self._new_cache,
            length=lambda cache: cache.length,
            truncate=KVCache.truncate,
            share=KVCache.truncate,
            dump=self._dump,
            load=self._load,
            nbytes=lambda cache: cache.keys.nbytes + cache.values.nbytes,
        )

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Add tokens, and feed all but the last; raise `ValueError` if the model cannot take them."""
        new = self._check(tokens)
        with self.slots.borrow(session) as state:
            state.append(new)
            self._check_room(state, 0)
            self._feed_all_but_last(state)
        return PrefillResult(tokens_processed=len(new))

    def prompt(self, session: Session, tokens: Sequence[int], /) -> int:
        """Make `tokens` the whole history; return how many were in the KV cache already."""
        history = self._check(tokens)
        with self.slots.borrow(session) as state:
            reused = state.reuse_prefix(history)
            self._check_room(state, 0)
            self._feed_all_but_last(state)
        return reused

    def decode(self, session: Session, /) -> DecodeResult:
        """Add the likeliest token; raise `ValueError` if the session is empty or its context full."""
        with self.slots.borrow(session) as state:
            if not state.token_history:
                raise ValueError("nothing to decode from: the session is empty, prefill it first")
            self._check_room(state, 1)
            self._feed_all_but_last(state)
            token = int(self._feed(state, state.pending, 1).argmax())
            state.append([token])
        return DecodeResult(token=token)

    def _new_cache(self) -> KVCache:
        layers, _, _, heads, head_size = self.model.query_key_value.shape
        # A chunk may begin at the last place; without room for all of it, JAX would move it back.
        shape = (layers, self.context_length + self.chunk, heads, head_size)
        empty = jnp.zeros(shape, self.model.embedding.dtype)
        return KVCache(empty, empty, 0)

    def _dump(self, cache: KVCache, file: BinaryIO) -> None:
        file.write(self._identity())
        file.write(_LENGTH.pack(cache.length))
        file.write(np.asarray(cache.keys[:, : cache.length]).tobytes())
        file.write(np.asarray(cache.values[:, : cache.length]).tobytes())

    def _load(self, file: BinaryIO) -> KVCache:
        identity = self._identity()
        if file.read(len(identity)) != identity:
            raise ValueError("the KV cache is that of another model")
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        if length > self.context_length:
            raise ValueError(f"{length} tokens do not fit in a context of {self.context_length}")
        cache = self._new_cache()
        layers, _, heads, head_size = cache.keys.shape

        def filled(empty: jax.Array) -> jax.Array:
            data = file.read(layers * length * heads * head_size * empty.itemsize)
            array = np.frombuffer(data, empty.dtype).reshape(layers, length, heads, head_size)
            return empty.at[:, :length].set(array)

        cache = KVCache(filled(cache.keys), filled(cache.values), length)
        jax.block_until_ready(cache)  # type: ignore[no-untyped-call]
        return cache

    def _identity(self) -> bytes:
        """Return a digest of samples of all weights."""
        digest = blake2b(digest_size=16)
        for weights in self.model:
            sample = weights.ravel()[:: weights.size // 8 + 1].tolist()
            digest.update(repr((weights.dtype, weights.shape, sample)).encode())
        return digest.digest()

    def _feed_all_but_last(self, state: BorrowedState[KVCache]) -> None:
        for tokens in state.chunks(self.chunk):
            self._feed(state, tokens, self.chunk)
            # The step may still be running: wait, so that nothing is committed that may yet fail.
            jax.block_until_ready(state.kv_cache)  # type: ignore[no-untyped-call]

    def _feed(self, state: BorrowedState[KVCache], tokens: Sequence[int], places: int) -> jax.Array:
        """Feed the next pending tokens, padded; return the logits (V,) after the last."""
        cache, count = state.kv_cache, len(tokens)
        padded = jnp.array([*tokens, *[0] * (places - count)])
        logits: jax.Array
        logits, keys, values = forward(self.model, cache, padded, count)
        state.kv_cache = KVCache(keys, values, cache.length + count)
        state.advance(count)
        return logits

    def _check(self, tokens: Sequence[int]) -> list[int]:
        ids = [index(token) for token in tokens]
        size = len(self.model.embedding)
        for place, token in enumerate(ids):
            if not 0 <= token < size:  # JAX would accept any number; and none belongs in a log.
                raise ValueError(f"token {place} (from 0) is not in the vocabulary of {size}")
        return ids

    def _check_room(self, state: BorrowedState[KVCache], new_tokens: int) -> None:
        count, most = len(state.token_history) + new_tokens, self.context_length
        if count > most:
            raise ValueError(f"{count} tokens do not fit in a context of {most}")


def random_model(seed: int, *, vocab_size: int = 128) -> Model:
    """Return random weights, large enough for every token, cached or not, to affect the output."""
    layers, hidden, heads, feed_forward = 3, 32, 4, 64
    names = iter(jax.random.split(jax.random.key(seed), len(Model._fields)))

    def weights(gain: float, *shape: int) -> jax.Array:
        return gain * jax.random.normal(next(names), shape)

    return Model(
        embedding=weights(1.0, vocab_size, hidden),
        query_key_value=weights(0.25, layers, hidden, 3, heads, hidden // heads),
        attention_output=weights(1.0, layers, heads, hidden // heads, hidden),
        up=weights(0.25, layers, hidden, feed_forward),
        down=weights(0.25, layers, feed_forward, hidden),
        output=weights(0.5, hidden, vocab_size),
    )
