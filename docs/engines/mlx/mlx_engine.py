"""An engine over MLX, with a model and KV caches of mlx-lm.

A KV cache is mlx-lm's list with a cache for each layer, changed in place, and checkpoints: sliding
windows and recurrent states can't be cut just anywhere. MLX is lazy: it computes on demand, so a
step isn't over before it is evaluated.
"""

# MLX and mlx-lm are typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import copy
import io
import json
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from operator import index
from struct import Struct
from typing import Any, BinaryIO, Protocol, TypeVar, cast

from inference_session import Session
from inference_session.engine import (
    TORN,
    BorrowedState,
    DecodeResult,
    PrefillResult,
    StateSlots,
)


try:
    import mlx.core as mx
    import mlx_lm
    from mlx.utils import tree_flatten, tree_map, tree_map_with_path
    from mlx_lm.models.cache import (
        CacheList,
        ChunkedKVCache,
        KVCache,
        QuantizedKVCache,
        RotatingKVCache,
        make_prompt_cache,
    )
    from mlx_lm.models.llama import Model, ModelArgs
except ModuleNotFoundError as error:
    msg = (
        "no MLX: install it with `pip install 'mlx[cpu]==0.32.4' mlx-lm==0.32.2` (on a Mac, `mlx`)"
    )
    raise ImportError(msg) from error


class LanguageModel(Protocol):
    """The interface needed from a model of mlx-lm."""

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """Return the logits after each token."""
        ...

    def parameters(self) -> Mapping[str, object]:
        """Return its weights."""
        ...

    def update(self, parameters: dict[str, object], /) -> object:
        """Replace its weights."""
        ...


class LayerCache(Protocol):
    """The interface needed from mlx-lm's cache of a layer."""

    offset: int
    """Tokens it covers. A recurrent state doesn't know."""

    @property
    def state(self) -> object:
        """The arrays in it."""
        ...

    def is_trimmable(self) -> bool:
        """Whether it can forget the last tokens."""
        ...

    def trim(self, n: int) -> int:
        """Forget the last n tokens, or as many as there are."""
        ...


WHOLE = (KVCache, QuantizedKVCache)
"""Caches of every token, which can be cut anywhere."""

WINDOWS = (RotatingKVCache, ChunkedKVCache)
"""Caches of every token, until the window is full."""

SPACING = 32
"""How many tokens are decoded, one by one, from one checkpoint to the next."""


@dataclass(frozen=True)
class Checkpoint:
    """The layers that can't be cut anywhere, as they were at `length` tokens."""

    length: int
    states: list[dict[str, object]]


class Cache:
    """The caches of all layers, how many tokens they cover, and checkpoints to go back to.

    A full sliding window can't be cut, nor can a recurrent state. These layers are copied before
    each step of more than one token (a part of a prompt, guesses to verify) and every 32 tokens
    otherwise. The older the copies are, the fewer are kept. mlx-lm's other kinds of caches are
    treated as recurrent states.
    """

    def __init__(self, layers: Sequence[LayerCache], max_checkpoints: int) -> None:
        """Hold the empty caches of a model's layers, and at most `max_checkpoints`."""
        self.layers = layers
        self.parts = list(parts(layers))
        self._lossy = [part for part in self.parts if type(part) not in WHOLE]
        self._length = 0
        self._checkpoints = [Checkpoint(0, [copy.deepcopy(vars(part)) for part in self._lossy])]
        self._max_checkpoints = max_checkpoints

    def length(self) -> int:
        """Return how many tokens all layers cover; `TORN` in a step, and after a failed one."""
        offsets = {getattr(part, "offset", self._length) for part in self.parts}
        return self._length if offsets <= {self._length} else TORN

    def nbytes(self) -> int:
        """Return the bytes of all arrays, including those of the checkpoints."""
        states = [checkpoint.states for checkpoint in self._checkpoints]
        return sum(array.nbytes for array in arrays([[vars(part) for part in self.parts], states]))

    @contextmanager
    def step(self, count: int) -> Generator[None]:
        """Cover `count` more tokens, if the block succeeds."""
        length, newest = self.length(), self._checkpoints[-1].length
        if length > newest and (count > 1 or length - newest >= SPACING):
            self._add_checkpoint(length)
        self._length = TORN
        yield
        self._length = length + count

    def truncate(self, length: int) -> Cache:
        """Keep the first `length` tokens, or as many of them as possible, perhaps none."""
        checkpoints = reversed(self._checkpoints)
        while self.length() > length:
            if all(is_complete(part) and part.offset >= length for part in self.parts):
                self._cut(length)
            else:
                self._go_back(next(checkpoints))
        self._checkpoints = [made for made in self._checkpoints if made.length <= length]
        return self

    def share(self, length: int) -> Cache:
        """Return another cache of the first `length` tokens, or as many of them as possible.

        It takes no memory until it grows: MLX copies an array that is shared when it's changed.
        """
        return copy.deepcopy(self).truncate(length)

    def dump(self, file: BinaryIO) -> None:
        """Write the checkpoints, and then the layers one by one."""
        checkpoints = [[made.length, made.states] for made in self._checkpoints]
        write(file, [self._length, checkpoints])
        for part in self.parts:
            write(file, without_spare_room(part))

    def load(self, file: BinaryIO) -> None:
        """Read into an empty cache what `dump` wrote."""
        self._length, checkpoints = read(file)
        self._checkpoints = [Checkpoint(length, states) for length, states in checkpoints]
        for part in self.parts:
            vars(part).update(read(file))

    def _add_checkpoint(self, length: int) -> None:
        if not self._lossy:
            return
        states = [tree_map(detached, vars(part)) for part in self._lossy]
        mx.eval(arrays(states))
        self._checkpoints.append(Checkpoint(length, states))
        if len(self._checkpoints) > 1 + self._max_checkpoints:
            del self._checkpoints[self._least_useful()]

    def _least_useful(self) -> int:
        """Return the index of the checkpoint with the smallest gap for its age; never the first."""
        lengths = [checkpoint.length for checkpoint in self._checkpoints]
        return min(
            range(1, len(lengths) - 1),
            key=lambda i: (lengths[i + 1] - lengths[i - 1]) / (lengths[-1] - lengths[i]),
            default=1,
        )

    def _go_back(self, checkpoint: Checkpoint) -> None:
        for part, state in zip(self._lossy, checkpoint.states, strict=True):
            vars(part).update(copy.deepcopy(state))  # Layers change their arrays.
        self._cut(checkpoint.length)

    def _cut(self, length: int) -> None:
        for part in self.parts:
            if is_complete(part):
                part.trim(max(part.offset - length, 0))
        self._length = length


def parts(layers: Sequence[LayerCache]) -> Iterator[LayerCache]:
    """Yield the cache of each layer; if a layer has several, one after the other."""
    for layer in layers:
        if isinstance(layer, CacheList):
            yield from parts(cast("Sequence[LayerCache]", layer.caches))
        else:
            yield layer


def is_complete(part: LayerCache) -> bool:
    """Return whether a cache holds every token, and can be cut anywhere."""
    # A chunked one claims to be trimmable even if it has dropped tokens.
    dropped = getattr(part, "start_position", 0)
    return type(part) in WHOLE + WINDOWS and part.is_trimmable() and not dropped


def without_spare_room(part: LayerCache) -> dict[str, object]:
    """Return what is in a cache, without the room for more tokens, which may hold old ones."""

    def first(array: mx.array) -> mx.array:
        return array[..., : part.offset, :]

    state: dict[str, object] = dict(vars(part))
    if type(part) in WHOLE and part.offset:
        state["keys"], state["values"] = tree_map(first, (state["keys"], state["values"]))
    return state


def detached(leaf: object) -> object:
    """Return an independent copy."""
    # A slice, such as the last tokens before a convolution, would keep its whole source in memory;
    # a contiguous copy doesn't.
    return mx.contiguous(leaf) if isinstance(leaf, mx.array) else copy.deepcopy(leaf)


def arrays(tree: object) -> list[mx.array]:
    """Return the arrays in a tree of lists and dicts."""
    leaves = cast("list[tuple[str, object]]", tree_flatten(tree))
    return [leaf for _, leaf in leaves if isinstance(leaf, mx.array)]


# Files: parts in the format of safetensors, each after its size. What isn't an array is JSON in
# their metadata, where arrays have numbers.

_SIZE = Struct("<Q")


def write(file: BinaryIO, tree: object) -> None:
    """Write a tree of lists and dicts."""
    found: dict[str, mx.array] = {}

    def outline(tree: object) -> object:
        if isinstance(tree, mx.array):
            found[str(len(found))] = tree
            return {"array": str(len(found) - 1)}
        if isinstance(tree, dict):
            return {name: outline(part) for name, part in cast("dict[str, object]", tree).items()}
        if isinstance(tree, list | tuple):
            return [outline(part) for part in cast("Sequence[object]", tree)]
        return tree

    data = io.BytesIO()
    metadata = {"outline": json.dumps(outline(tree))}
    mx.save_safetensors(data, found, metadata)
    file.write(_SIZE.pack(data.tell()))
    file.write(data.getbuffer())


def read(file: BinaryIO) -> Any:
    """Read a tree that `write` wrote."""
    (size,) = _SIZE.unpack(file.read(_SIZE.size))
    data = io.BytesIO(file.read(size))
    loaded = mx.load(data, format="safetensors", return_metadata=True)
    found, metadata = cast("tuple[dict[str, mx.array], dict[str, str]]", loaded)
    mx.eval(*found.values())

    def named(outline: dict[str, Any]) -> Any:
        return found[outline["array"]] if outline.keys() == {"array"} else outline

    return json.loads(metadata["outline"], object_hook=named)


class MLXEngine:
    """An `inference_session.engine.Engine`.

    Every call feeds all pending tokens, for whatever reason they are pending, and leaves the last
    token of a session pending, to decode from.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        chunk: int = 512,
        checkpoints: int = 8,
        cache: Callable[[], Sequence[LayerCache]] | None = None,
    ) -> None:
        """Serve a language model of mlx-lm.

        Args:
            model: the model.
            chunk: the most tokens of a session fed at once.
            checkpoints: the most checkpoints of a session, if it needs any. Each has the size of
                the model's recurrent states and sliding windows.
            cache: returns new caches for the layers, such as quantized ones; by default, the
                model's own.
        """
        self.model = model
        self.chunk = chunk
        self.checkpoints = checkpoints
        self._new_layers = cache or (lambda: make_prompt_cache(cast("Model", model)))
        self.slots = StateSlots(
            create=self._create,
            length=Cache.length,
            truncate=Cache.truncate,
            share=Cache.share,
            dump=self._dump,
            load=self._load,
            nbytes=Cache.nbytes,
        )
        # MLX streams belong to a thread, but a session may move between threads: one must be able
        # to evaluate arrays left unevaluated by another. This kind can do so, but needs a lock.
        self._stream = mx.new_thread_unsafe_stream(mx.default_device())
        self._lock = threading.Lock()
        # Nothing is computed: arrays have shapes before they have values.
        self._vocab_size = model(mx.array([[0]]), cache=self._new_layers()).shape[-1]

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Add tokens and fill the KV cache with all but the last."""
        new = self._check(tokens)
        with self.slots.borrow(session) as state:
            state.append(new)
            self.feed_all_but_last(state)
        return PrefillResult(tokens_processed=len(new))

    def prompt(self, session: Session, tokens: Sequence[int], /) -> int:
        """Make `tokens` the whole history; return how many were in the KV cache already."""
        history = self._check(tokens)
        with self.slots.borrow(session) as state:
            reused = state.reuse_prefix(history)
            self.feed_all_but_last(state)
        return reused

    def decode(self, session: Session, /) -> DecodeResult:
        """Add the likeliest next token."""
        with self.slots.borrow(session) as state:
            if not state.token_history:
                msg = "nothing to decode from: the session is empty, prefill it first"
                raise ValueError(msg)
            self.feed_all_but_last(state)
            (token,) = self.feed(state, state.pending)
            state.append([token])
        return DecodeResult(token=token)

    def feed_all_but_last(self, state: BorrowedState[Cache]) -> None:
        """Feed all pending tokens but the last."""
        for tokens in state.chunks(self.chunk):
            self.feed(state, tokens)

    def feed(self, state: BorrowedState[Cache], tokens: Sequence[int]) -> list[int]:
        """Feed the next pending tokens; return the likeliest token to follow each of them."""
        choices = self._feed(state.kv_cache, tokens)
        state.advance(len(tokens))
        return choices

    def _create(self) -> Cache:
        return Cache(self._new_layers(), self.checkpoints)

    def _dump(self, cache: Cache, file: BinaryIO) -> None:
        with self._lock, mx.stream(self._stream):
            file.write(self._identity())
            cache.dump(file)

    def _load(self, file: BinaryIO) -> Cache:
        cache = self._create()
        with self._lock, mx.stream(self._stream):
            identity = self._identity()
            if file.read(len(identity)) != identity:
                msg = "the KV cache is that of another model, kind of cache or version of mlx-lm"
                raise ValueError(msg)
            cache.load(file)
        return cache

    def _identity(self) -> bytes:
        """Return a digest of what a KV cache depends on, with samples of all weights."""
        kinds = [(type(part).__name__, vars(part)) for part in self._create().parts]
        arguments = getattr(self.model, "args", None)
        digest = blake2b(repr((mlx_lm.__version__, arguments, kinds)).encode(), digest_size=16)
        for weights in arrays(self.model.parameters()):
            sample = weights.flatten()[:: weights.size // 8 + 1].tolist()
            digest.update(repr((weights.dtype, weights.shape, sample)).encode())
        return digest.digest()

    def _feed(self, cache: Cache, tokens: Sequence[int]) -> list[int]:
        with self._lock, mx.stream(self._stream), cache.step(len(tokens)):
            logits = self.model(mx.array([tokens]), cache=cache.layers)[0]
            choices = mx.argmax(logits, axis=-1)
            # Evaluate now: out of memory or Ctrl-C must not surface in a later step or borrow.
            mx.eval(choices, [part.state for part in cache.parts])
        return cast("list[int]", choices.tolist())

    def _check(self, tokens: Sequence[int]) -> list[int]:
        ids = [index(token) for token in tokens]
        for place, token in enumerate(ids):
            if not 0 <= token < self._vocab_size:  # MLX would accept any number.
                msg = f"token {place} (from 0) isn't in the vocabulary of {self._vocab_size}"
                raise ValueError(msg)
        return ids


M = TypeVar("M", bound=LanguageModel)


def random_model(seed: int, *, vocab_size: int = 128, num_layers: int = 3) -> Model:
    """Return a small Llama with random weights, to test with."""
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
    return with_random_weights(Model(args), seed)


def with_random_weights(model: M, seed: int) -> M:
    """Give a model random weights, and return it.

    They are large enough for every token of the input, and every layer's cache of it, to affect the
    output. Without a separate output matrix, the model would echo its input.
    """
    keys = iter(mx.random.split(mx.random.key(seed), 200))

    def weights(name: str, array: mx.array) -> mx.array:
        if array.ndim == 1:  # Keep those of norms, which are 1.
            return array
        gain = 3.0 if "o_proj" in name or "lm_head" in name else 1.5
        scale = 1.0 if "embed" in name else gain * array.shape[1] ** -0.5
        return scale * mx.random.normal(array.shape, key=next(keys))

    model.update(tree_map_with_path(weights, model.parameters()))
    mx.eval(model.parameters())
    return model
