"""A Llama in NumPy: the arithmetic, and its KV caches. It knows nothing of sessions.

Real weights come from `smollm2.py`, small random ones from `random_model`.

Shapes are written with R rows (tokens of all sequences in a pass), D the hidden size, H heads,
K key-value heads of d numbers each, F the feed-forward size and V the vocabulary. All arrays
are float32 unless stated otherwise.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import numpy as np
from numpy.lib.format import read_array, write_array_header_1_0
from numpy.typing import NDArray


Floats = NDArray[np.float32]
Tokens = NDArray[np.int32]
Batch = Sequence[tuple["Cache", Tokens]]


class Cache(Protocol):
    """A KV cache, as the model sees it: `KVCache` is one."""

    length: int
    """How many tokens it covers; the model moves it at the end of a pass."""

    def write(self, index: int, keys_values: Floats, /) -> tuple[Floats, Floats]:
        """Put keys and values behind the tokens of layer `index`; return all of the layer."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """Hyper-parameters of a model."""

    vocab_size: int
    context_length: int
    num_layers: int
    hidden_size: int
    feed_forward_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_epsilon: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaLayer:
    """The weights of a layer; a matrix maps its rows to its columns, and `x @ matrix` applies it.

    Matrices with the same input are joined: one large product is faster than three small ones.
    """

    attention_norm: Floats
    """(D,)"""
    query_key_value: Floats
    """(D, (H + 2K) d)"""
    attention_output: Floats
    """(H d, D)"""
    feed_forward_norm: Floats
    """(D,)"""
    gate_up: Floats
    """(D, 2F)"""
    down: Floats
    """(F, D)"""


class KVMemory:
    """All KV caches of an engine, and the bytes they may hold together.

    `limit` (bytes, None for no limit) may be set at any time. It plays the part of a GPU's memory:
    a cache that must grow beyond it raises `MemoryError`, at any point in the model.
    """

    def __init__(self, config: LlamaConfig, *, limit: int | None = None) -> None:
        self.limit = limit
        self.created = 0
        self.released = 0
        self._config = config
        self._caches: set[KVCache] = set()  # Those with memory.
        # The garbage collector may release a session at any time, also in a thread that is running
        # one of these methods.
        self._lock = threading.RLock()

    @property
    def used(self) -> int:
        """The bytes held by the caches."""
        with self._lock:
            return sum(cache.nbytes for cache in tuple(self._caches))

    def create(self) -> KVCache:
        """Return a new, empty cache."""
        with self._lock:
            self.created += 1
        return KVCache(self, self._config)

    def release(self, cache: KVCache) -> None:
        """Free a cache; raise `ValueError` if it was freed already."""
        with self._lock:
            if not cache.layers:
                msg = "a KV cache was released twice"
                raise ValueError(msg)
            cache.layers = []
            self._caches.discard(cache)
            self.released += 1

    def grow(self, cache: KVCache, index: int, capacity: int) -> None:
        """Make room for `capacity` tokens in a layer of a cache, or raise `MemoryError`."""
        layer = cache.layers[index]
        larger = np.empty((*layer.shape[:2], capacity, layer.shape[3]), np.float32)
        larger[:, :, : cache.length] = layer[:, :, : cache.length]
        self._place(cache, index, larger)

    def share(self, cache: KVCache, length: int) -> KVCache:
        """Return a copy of a cache's first `length` tokens, or raise `MemoryError`."""
        kept = slice(min(cache.length, length))
        return self._filled(layer[:, :, kept].copy() for layer in cache.layers)

    def load(self, file: BinaryIO) -> KVCache:
        """Return the cache that `KVCache.dump` wrote; `ValueError` if it is another model's."""
        layers = read_array(file, allow_pickle=False)
        config = self._config
        fitting = (config.num_layers, 2, config.num_kv_heads, *layers.shape[3:4], config.head_dim)
        if layers.shape != fitting or layers.dtype != np.float32:
            msg = (
                f"the file has a KV cache {layers.shape} of {layers.dtype}, "
                f"and this model wants {fitting} of float32"
            )
            raise ValueError(msg)
        return self._filled(layers)

    def _filled(self, layers: Iterable[Floats]) -> KVCache:
        """Return a new cache with these layers, or release it and raise."""
        cache = self.create()
        try:
            for index, layer in enumerate(layers):
                self._place(cache, index, layer)
        except BaseException:
            self.release(cache)
            raise
        cache.length = cache.layers[0].shape[2]
        return cache

    def _place(self, cache: KVCache, index: int, layer: Floats) -> None:
        with self._lock:
            if self.limit is not None and self.used + layer.nbytes > self.limit:
                msg = (
                    f"layer {index + 1} of {len(cache.layers)}: no room for {layer.nbytes:,} "
                    f"bytes in a KV memory of {self.limit:,}"
                )
                raise MemoryError(msg)
            self._caches.add(cache)
            cache.layers[index] = layer


class KVCache:
    """The keys and values of one sequence.

    `layers` has an array (2, K, capacity, d) for each layer, keys and then values, with the tokens
    of a head next to each other, in the order attention reads them.

    `length` counts the tokens in *every* layer: a pass writes behind it and moves it at its end, so
    a pass that fails half-way leaves no trace in it.
    """

    FIRST_CAPACITY = 64
    """The first capacity in tokens; then it doubles."""

    def __init__(self, memory: KVMemory, config: LlamaConfig) -> None:
        empty = np.empty((2, config.num_kv_heads, 0, config.head_dim), np.float32)
        self.layers: list[Floats] = [empty] * config.num_layers
        self.length = 0
        self._memory = memory

    @property
    def nbytes(self) -> int:
        """The bytes of the arrays, used or not."""
        return sum(layer.nbytes for layer in self.layers)

    def truncate(self, length: int) -> KVCache:
        """Keep at most the first `length` tokens; the memory stays, for the next ones."""
        self.length = min(self.length, length)
        return self

    def dump(self, file: BinaryIO) -> None:
        """Write the keys and values of all layers to a file, as one array, layer by layer."""
        kept = [layer[:, :, : self.length] for layer in self.layers]
        shape = (len(kept), *kept[0].shape)
        header = {"descr": kept[0].dtype.str, "fortran_order": False, "shape": shape}
        write_array_header_1_0(file, header)
        file.writelines(layer.tobytes() for layer in kept)

    def write(self, index: int, keys_values: Floats) -> tuple[Floats, Floats]:
        """Put keys and values (R, 2K, d) behind the tokens of layer `index`.

        Returns all keys and all values of the layer, (K, length + R, d) each. Raises `MemoryError`
        if the layer must grow and there is no room.
        """
        end = self.length + len(keys_values)
        capacity = self.layers[index].shape[2]
        if end > capacity:
            self._memory.grow(self, index, max(end, 2 * capacity, self.FIRST_CAPACITY))
        layer = self.layers[index]
        layer.reshape(-1, *layer.shape[2:])[:, self.length : end] = keys_values.transpose(1, 0, 2)
        return layer[0, :, :end], layer[1, :, :end]


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama:
    """The model: its weights never change, so any number of threads may use them at once."""

    config: LlamaConfig
    embedding: Floats
    """(V, D)"""
    layers: Sequence[LlamaLayer]
    output_norm: Floats
    """(D,)"""
    output: Floats
    """(D, V)"""

    def forward(self, batch: Batch) -> Floats:
        """Feed each cache its next tokens, at least one, in a single pass over the weights.

        Returns the hidden state of the last token of each sequence, (len(batch), D), to compute the
        next token from.
        """
        ends = np.cumsum([len(tokens) for _, tokens in batch])
        last: Floats = self.hidden_states(batch)[ends - 1]
        return last

    def hidden_states(self, batch: Batch) -> Floats:
        """Do the same as `forward`, but return the hidden states of all tokens fed, (R, D).

        Reading the weights is most of the work, and all rows share it.
        """
        config = self.config
        x: Floats = self.embedding[np.concatenate([tokens for _, tokens in batch])]  # (R, D)
        ends = np.cumsum([len(tokens) for _, tokens in batch])
        spans = [
            (cache, slice(end - len(tokens), end), _causal_mask(cache.length, len(tokens)))
            for (cache, tokens), end in zip(batch, ends.tolist(), strict=True)
        ]
        rotation = self._rotation(batch)
        num_rotated = config.num_heads + config.num_kv_heads  # Queries and keys, not values.
        attended = np.empty((len(x), config.num_heads * config.head_dim), np.float32)

        for index, layer in enumerate(self.layers):
            qkv = self._norm(x, layer.attention_norm) @ layer.query_key_value
            heads = qkv.reshape(len(x), -1, config.head_dim)
            pairs = heads[:, :num_rotated].view(np.complex64)
            pairs *= rotation
            for cache, rows, mask in spans:
                keys, values = cache.write(index, heads[rows, config.num_heads :])
                attended[rows] = _attention(heads[rows, : config.num_heads], keys, values, mask)
            x += attended @ layer.attention_output

            gate_up = self._norm(x, layer.feed_forward_norm) @ layer.gate_up
            gate, up = (
                gate_up[:, : config.feed_forward_size],
                gate_up[:, config.feed_forward_size :],
            )
            x += (_silu(gate) * up) @ layer.down

        for cache, tokens in batch:
            cache.length += len(tokens)
        return x

    def logits(self, hidden: Floats) -> Floats:
        """Return the logits (B, V) of the next tokens after hidden states (B, D)."""
        return self._norm(hidden, self.output_norm) @ self.output

    def _rotation(self, batch: Batch) -> NDArray[np.complex64]:
        """Return the rotary embedding of all rows, (R, 1, d/2).

        It rotates pairs of neighbours by an angle proportional to the position: taken as a complex
        number, a pair is multiplied by e^(i angle).
        """
        dim = self.config.head_dim
        frequencies = self.config.rope_theta ** (-np.arange(0, dim, 2) / dim)
        positions = [cache.length + np.arange(len(tokens)) for cache, tokens in batch]
        angles = np.outer(np.concatenate(positions), frequencies)
        rotation: NDArray[np.complex64] = np.exp(1j * angles).astype(np.complex64)
        return rotation[:, np.newaxis]

    def _norm(self, x: Floats, weight: Floats) -> Floats:
        mean_square = np.vecdot(x, x)[:, np.newaxis] / np.float32(x.shape[1])
        normed: Floats = x / np.sqrt(mean_square + np.float32(self.config.norm_epsilon)) * weight
        return normed


def _silu(x: Floats) -> Floats:
    # x times the logistic function of x, in a form that cannot overflow.
    half = x * np.float32(0.5)
    activated: Floats = np.tanh(half)
    activated += 1
    activated *= half
    return activated


def _causal_mask(past: int, new: int) -> Floats | None:
    """Return (new, past + new): minus infinity where a token would see its future."""
    if new == 1:
        return None
    mask: Floats = np.triu(np.full((new, past + new), -np.inf, np.float32), past + 1)
    return mask


def _attention(queries: Floats, keys: Floats, values: Floats, mask: Floats | None) -> Floats:
    """Let (R, H, d) queries attend to (K, S, d) keys and values; return (R, H d)."""
    rows, heads, dim = queries.shape
    groups = len(keys)  # Heads of a group share their keys and values.
    grouped = queries.reshape(rows, groups, -1, dim).transpose(1, 2, 0, 3).reshape(groups, -1, dim)
    scores = (grouped * np.float32(dim**-0.5)) @ keys.transpose(0, 2, 1)  # (K, H/K R, S)
    if mask is not None:
        scores.reshape(groups, -1, *mask.shape)[:] += mask
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    mixed: Floats = scores @ values / scores.sum(axis=-1, keepdims=True)
    return mixed.reshape(groups, -1, rows, dim).transpose(2, 0, 1, 3).reshape(rows, heads * dim)


def random_model(
    seed: int, *, vocab_size: int = 128, num_layers: int = 3, context_length: int = 512
) -> Llama:
    """Return a small model with random weights, to test with.

    They are large enough for every token of the input, and every layer's cache of it, to affect the
    output.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        context_length=context_length,
        num_layers=num_layers,
        hidden_size=32,
        feed_forward_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_theta=100.0,
        norm_epsilon=1e-5,
    )
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, gain: float) -> Floats:
        scaled = rng.standard_normal((rows, columns), np.float32) * np.float32(gain * rows**-0.5)
        return scaled.astype(np.float32)

    def norm() -> Floats:
        return rng.uniform(0.5, 1.5, config.hidden_size).astype(np.float32)

    attention_size = config.num_heads * config.head_dim
    layers = [
        LlamaLayer(
            attention_norm=norm(),
            query_key_value=matrix(
                config.hidden_size, attention_size + 2 * config.num_kv_heads * config.head_dim, 1.5
            ),
            attention_output=matrix(attention_size, config.hidden_size, 3.0),
            feed_forward_norm=norm(),
            gate_up=matrix(config.hidden_size, 2 * config.feed_forward_size, 1.5),
            down=matrix(config.feed_forward_size, config.hidden_size, 2.0),
        )
        for _ in range(num_layers)
    ]
    return Llama(
        config=config,
        embedding=rng.standard_normal((vocab_size, config.hidden_size), np.float32),
        layers=layers,
        output_norm=norm(),
        output=matrix(config.hidden_size, vocab_size, 5.0),
    )
