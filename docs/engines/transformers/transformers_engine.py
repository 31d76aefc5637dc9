"""An engine over Hugging Face transformers: any causal LM, one KV cache per session.

pip install torch==2.13.0
pip install transformers==5.23.0
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import blake2b
from inspect import signature
from operator import index
from struct import Struct
from threading import Lock
from typing import Any, BinaryIO, TypeAlias, cast

from inference_session import Session
from inference_session.engine import TORN, BorrowedState, DecodeResult, PrefillResult, StateSlots


try:
    import torch
    import transformers
    from safetensors.torch import load, save
    from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"no {error.name}: install it with `pip install torch==2.13.0` and then "
        "`pip install transformers==5.23.0`",
        name=error.name,
    ) from error


# The KV cache of attention layers, as plain functions

GROWING = {
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
}
"""Kinds of layers whose keys and values grow with each token, until a window is full."""

NOTHING_TO_CUT = {"DummyLayer", "LinearAttentionLayer"}
"""Kinds of layers without keys and values."""


def layers(cache: Cache) -> list[Any]:
    """Return the layers of a cache: attention layers have a length, recurrent ones have states."""
    return cast("list[Any]", cache.layers)


def length(kv: Cache | CountedCache) -> int:
    """Return how many tokens all layers cover, or `TORN`; `get_seq_length()` reads only one."""
    lengths: set[int] = set()
    if isinstance(kv, CountedCache):
        lengths, kv = {kv.count}, kv.cache
    lengths |= {_length(layer) for layer in layers(kv) if hasattr(layer, "get_seq_length")}
    return max(lengths, default=0) if len(lengths) < 2 else TORN


def _length(layer: Any) -> int:
    keys, values = layer.keys, layer.values  # (1, heads, tokens, head size)
    if keys is None or values is None:
        return 0  # Never fed.
    if keys.shape[:-1] != values.shape[:-1] or (keys.ndim > 1 and len(keys) != 1):
        return TORN  # A step failed between the two; or there is more than one sequence.
    return int(layer.get_seq_length())


def cut(cache: Cache, kept: int) -> bool:
    """Keep the first `kept` tokens in all layers, at least one; return False if that is impossible.

    It is impossible if tokens have left a window, and for unknown kinds of layers.
    """
    return all(_cut(layer, kept) for layer in layers(cache))


def _cut(layer: Any, kept: int) -> bool:
    kind = type(layer).__name__
    if kind == "StaticLayer" and hasattr(layer, "cumulative_length"):  # Not in transformers 4.
        layer.cumulative_length.fill_(kept)  # The rest is masked, and overwritten.
        return True
    if kind in GROWING:
        return _shorten(layer, kept)
    return kind in NOTHING_TO_CUT


def _shorten(layer: DynamicLayer, kept: int) -> bool:
    if isinstance(layer, DynamicSlidingWindowLayer):
        if layer.cumulative_length == kept:  # A step sets it before it changes anything else.
            return True
        if layer.cumulative_length >= layer.sliding_window:
            return False
        layer.cumulative_length = kept
    keys, values = layer.keys, layer.values
    if keys is None or values is None or min(keys.shape[-2], values.shape[-2]) < kept:
        return False
    layer.keys, layer.values = keys[..., :kept, :], values[..., :kept, :]
    return True


def nbytes(kv: Cache | CountedCache) -> int:
    """Return the bytes kept alive by a cache: a cut tensor is a view of the whole one."""
    held: list[object] = []
    if isinstance(kv, CountedCache):
        held, kv = [kv.checkpoints], kv.cache
    held += map(vars, layers(kv))
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors(held))


def tensors(held: object) -> Iterator[torch.Tensor]:
    """Go through all tensors in nested lists, tuples and dicts."""
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, dict):
        yield from tensors(list(cast("dict[object, object]", held).values()))
    elif isinstance(held, list | tuple):
        for part in cast("Sequence[object]", held):
            yield from tensors(part)


# The KV cache of recurrent layers


class CountedCache:
    """A cache with recurrent layers, whose states have no length and can't be cut.

    So the tokens are counted beside them. Copies of the states, which are small, serve as
    checkpoints; attention layers are cut to the same length.
    """

    EVERY = 32
    """How many tokens are decoded from one checkpoint to the next."""

    def __init__(self, cache: Cache, *, checkpoints: int) -> None:
        """Count the tokens fed to an empty cache, and keep at most so many checkpoints."""
        self.cache = cache
        self.count = 0  # TORN while the model runs, and from then on if it fails.
        self.checkpoints: dict[int, list[torch.Tensor]] = {}  # By the number of tokens covered.
        self._most = checkpoints
        self._last_fed = 1

    @contextmanager
    def feed(self, tokens: int) -> Generator[Cache]:
        """Give the cache to the model, to be fed a number of tokens."""
        count, self.count = self._checkpoint(tokens), TORN
        yield self.cache
        if count != TORN:
            self.count = count + tokens

    def cut(self, most: int) -> bool:
        """Keep at most the first `most` tokens, by a checkpoint; return False if there is none."""
        kept = length(self)
        if kept > most:  # Also if it is TORN.
            kept = max((at for at in self.checkpoints if at <= most), default=0)
        if not kept or not cut(self.cache, kept):
            return False
        if kept in self.checkpoints:
            for state, saved in zip(self._states(), self.checkpoints[kept], strict=True):
                state.copy_(saved)
        self.count = kept
        self.checkpoints = {at: saved for at, saved in self.checkpoints.items() if at <= kept}
        return True

    def _checkpoint(self, tokens: int) -> int:
        """Copy the states if the next step, or the last one, is likely to be undone."""
        since = self.count - max(self.checkpoints, default=0)
        if 0 < self.count < TORN and self._most:
            if max(tokens, self._last_fed) > 1 or since >= self.EVERY:
                self.checkpoints[self.count] = [state.clone() for state in self._states()]
            if len(self.checkpoints) > self._most:  # Dense near the end, sparse far from it.
                at = [0, *sorted(self.checkpoints)]
                gaps = zip(at, at[1:], at[2:], strict=False)
                gap = min(gaps, key=lambda gap: (gap[2] - gap[0]) / (self.count - gap[0]))
                del self.checkpoints[gap[1]]
        self._last_fed = tokens
        return self.count

    def _states(self) -> Iterator[torch.Tensor]:
        for layer in filter(is_recurrent, layers(self.cache)):
            yield from tensors([layer.conv_states, layer.recurrent_states])


def is_recurrent(layer: object) -> bool:
    """Return whether a layer has recurrent states, alone or beside its attention."""
    return hasattr(layer, "recurrent_states")


KV: TypeAlias = Cache | CountedCache


# Branches and files


def copied(kv: KV) -> KV:
    """Return another KV cache that covers the same tokens."""
    if not isinstance(kv, CountedCache):
        return _copied(kv)
    other = copy.copy(kv)
    other.cache, other.checkpoints = _copied(kv.cache), dict(kv.checkpoints)
    return other


def _copied(cache: Cache) -> Cache:
    other = copy.copy(cache)
    # These replace keys and values, and never change them in place.
    replacing = {DynamicLayer, DynamicSlidingWindowLayer}
    other.layers = [
        copy.copy(layer) if type(layer) in replacing else copy.deepcopy(layer)
        for layer in layers(cache)
    ]
    return other


def tensors_of(layer: Any) -> dict[str, torch.Tensor]:
    """Return the keys, values and states of a layer, by name."""
    found = {name: getattr(layer, name, None) for name in ("keys", "values")}
    for name in "conv_states", "recurrent_states":
        for number, state in getattr(layer, name, {}).items():
            found[f"{name} {number}"] = state
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def fill(layer: Any, saved: dict[str, torch.Tensor], count: int) -> None:
    """Give an empty layer what `tensors_of` returned of one that covers `count` tokens."""
    if "keys" in saved:
        layer.update(saved.pop("keys"), saved.pop("values"))
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = count  # A window was given its end only.
    update = {"conv_states": "update_conv_state", "recurrent_states": "update_recurrent_state"}
    for place, state in saved.items():
        name, number = place.split()
        getattr(layer, update[name])(state, int(number))


_SIZE = Struct("<Q")


def write(file: BinaryIO, part: dict[str, torch.Tensor]) -> None:
    """Write some tensors as safetensors, after their size."""
    data = save({name: tensor.contiguous() for name, tensor in part.items()})
    file.write(_SIZE.pack(len(data)))
    file.write(data)


def read(file: BinaryIO, device: torch.device) -> dict[str, torch.Tensor]:
    """Read the next tensors from a file."""
    (size,) = _SIZE.unpack(file.read(_SIZE.size))
    return {name: tensor.to(device) for name, tensor in load(file.read(size)).items()}


# The engine

FORGETFUL = frozenset({"falcon_mamba", "jamba", "mamba", "zamba"})
"""Models that forget their state if fed several tokens at once, in transformers 5.23.0."""


class TransformersEngine:
    """An `inference_session.engine.Engine`: any number of sessions, sharing a model.

    Between calls the last token of a session is always pending, to compute the next one from.
    Every call feeds all pending tokens, for whatever reason they are pending, is atomic, and can
    raise the errors of `StateSlots.borrow`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        chunk: int = 256,
        cache: Callable[[], Cache] | None = None,
        checkpoints: int = 8,
    ) -> None:
        """Serve `model`; feed it at most `chunk` tokens at once.

        There are two exceptions. Mamba, Falcon-Mamba, Jamba and Zamba lose their state when fed
        several tokens: they get a new prompt as a whole, and anything else token by token. LongRoPE
        (Phi-3) rotates all keys differently once there are more tokens than in the model's first
        training: then all of these are fed at once.

        Args:
            model: any causal language model whose whole state is in its KV cache.
            chunk: the most tokens fed at once.
            cache: returns a new KV cache; by default, `DynamicCache(config=model.config)`.
            checkpoints: how many copies of its recurrent states a session may keep.

        Raises:
            ValueError: if the model keeps its state elsewhere.
        """
        config = model.config.get_text_config()
        self.model: PreTrainedModel = model.eval()  # type: ignore[no-untyped-call]
        self.chunk = chunk
        self.checkpoints = checkpoints
        self._new_cache = cache or (lambda: DynamicCache(config=model.config))
        kinds = layers(self._new_cache())
        self._recurrent = any(map(is_recurrent, kinds))
        self._attention = any(hasattr(layer, "get_seq_length") for layer in kinds) or not kinds
        stateful = {"conv", "linear_attention"}.intersection(
            getattr(config, "layer_types", None) or ()
        )
        if (stateful or getattr(model, "_is_stateful", False)) and not self._recurrent:
            raise ValueError(
                f"{config.model_type} models keep a state where it can't be counted; "
                "transformers 5.23.0 keeps that of more models in their cache"
            )
        self._forgetful = config.model_type in FORGETFUL
        self._rope_limit = _longrope_limit(config)
        # The factors are in the model: they must not change while it runs.
        self._lock: AbstractContextManager[object] = (
            nullcontext() if self._rope_limit is None else Lock()
        )
        parameters = signature(model.forward).parameters
        self._cache_name = "cache_params" if "cache_params" in parameters else "past_key_values"
        fixed = [layer.max_cache_len for layer in kinds if type(layer).__name__ == "StaticLayer"]
        self._most = min([self._config("max_position_embeddings"), *fixed])
        self._kinds = [type(layer).__name__ for layer in kinds]
        can_save = (
            bool(kinds)
            and GROWING.union(NOTHING_TO_CUT).issuperset(self._kinds)
            and len({weights.device for weights in model.parameters()}) == 1
        )
        self.slots = StateSlots(
            create=self._create,
            length=length,
            truncate=self._truncate,
            share=self._share,
            dump=self._dump if can_save else None,
            load=self._load if can_save else None,
            nbytes=nbytes,
        )

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Add tokens, and feed all but the last; raise `ValueError` if the model cannot take them."""
        new = self._check(tokens)
        with self.borrow(session, len(new)) as state:
            state.append(new)
            self._check_room(state, 0)
            self.feed_all_but_last(state)
        return PrefillResult(tokens_processed=len(new))

    def prompt(self, session: Session, tokens: Sequence[int], /) -> int:
        """Make `tokens` the whole history; return how many were in the KV cache already."""
        history = self._check(tokens)
        with self.slots.borrow(session, key=self._key(len(history))) as state:
            reused = state.reuse_prefix(history)
            self._check_room(state, 0)
            self.feed_all_but_last(state)
        return reused

    def decode(self, session: Session, /) -> DecodeResult:
        """Add the likeliest token; raise `ValueError` if the session is empty or its context full."""
        with self.borrow(session) as state:
            self._check_room(state, 1)
            self.feed_all_but_last(state)
            token = int(self.feed(state, state.pending)[-1].argmax())
            state.append([token])
        return DecodeResult(token=token)

    def generate(self, session: Session, max_new_tokens: int, /, **options: object) -> list[int]:
        """Add the tokens of `model.generate`, all or none, and return them.

        `options` go to `model.generate`; it must generate one sequence only, without beams.

        Raises:
            ValueError: as `decode`; also if the model has no attention layers, as `model.generate`
                cannot go on from its cache; or if it would cross the limit of LongRoPE. Then use
                `decode`.
        """
        with self.borrow(session) as state:
            self._check_room(state, max_new_tokens)
            self._check_generate(len(state.token_history), max_new_tokens)
            self.feed_all_but_last(state)
            history = torch.tensor([state.token_history[:]], device=self.model.device)
            with self._lock, feeding(state.kv_cache, max_new_tokens) as cache:
                sequences = cast("Any", self.model).generate(
                    history,
                    attention_mask=torch.ones_like(history),
                    past_key_values=cache,
                    max_new_tokens=max_new_tokens,
                    **options,
                )
            new: list[int] = sequences[0, history.shape[1] :].tolist()
            if isinstance(state.kv_cache, CountedCache):
                state.kv_cache.count -= max_new_tokens - len(new)  # It stopped early.
            state.append(new)
            state.advance(len(new))  # The pending token and all new ones but the last were fed.
        return new

    @contextmanager
    def borrow(self, session: Session, more: int = 0) -> Generator[BorrowedState[KV]]:
        """Borrow a session, under the key for its length with `more` tokens."""
        while True:
            key = self._key(session.token_count + more)
            with self.slots.borrow(session, key=key) as state:
                if self._key(len(state.token_history) + more) == key:  # No step came in between.
                    yield state
                    return

    def feed_all_but_last(self, state: BorrowedState[KV]) -> None:
        """Feed all pending tokens but the last, to compute the next one from."""
        parts = state.chunks(self.chunk)
        if size := self._undivided(state):
            if size >= len(state.pending):
                return  # The last token has to go with them.
            self.feed(state, next(state.chunks(size)))
        for part in parts:
            self.feed(state, part)

    @torch.no_grad()
    def feed(
        self, state: BorrowedState[KV], tokens: Sequence[int], *, logits: int = 1
    ) -> torch.Tensor:
        """Feed the next pending tokens.

        Returns:
            The logits after each of the last `logits` tokens, (logits, vocabulary size).
        """
        if self._forgetful and state.kv_length and len(tokens) > 1:
            return torch.cat([self.feed(state, [token]) for token in tokens])[-logits:]
        with self._lock, feeding(state.kv_cache, len(tokens)) as cache:
            output = self.model(
                input_ids=torch.tensor([tokens], device=self.model.device),
                use_cache=True,
                logits_to_keep=logits,
                **{self._cache_name: cache},
            )
        state.advance(len(tokens))
        after: torch.Tensor = output.logits[0, -logits:]
        return after

    def _undivided(self, state: BorrowedState[KV]) -> int:
        """Return how many tokens must be fed together next, or 0."""
        count, covered = len(state.token_history), state.kv_length
        if self._forgetful and not covered:
            return max(count - 1, 0)
        if self._rope_limit is not None and covered <= self._rope_limit < count:
            return self._rope_limit + 1 - covered
        return 0

    def _create(self) -> KV:
        cache = self._new_cache()
        return CountedCache(cache, checkpoints=self.checkpoints) if self._recurrent else cache

    def _truncate(self, kv: KV, most: int) -> KV:
        most = min(most, length(kv))
        if most and (kv.cut(most) if isinstance(kv, CountedCache) else cut(kv, most)):
            return kv
        return self._create()

    def _share(self, kv: KV, most: int) -> KV:
        other = copied(kv)
        return other if length(kv) <= most else self._truncate(other, most)

    def _dump(self, kv: KV, file: BinaryIO) -> None:
        """Write what a cache depends on, its length and checkpoints, and its layers, one by one."""
        file.write(self._identity())
        saved = {"length": torch.tensor(length(kv))}
        if isinstance(kv, CountedCache):
            for count, states in kv.checkpoints.items():
                saved |= {f"{count} {number}": state for number, state in enumerate(states)}
            kv = kv.cache
        write(file, saved)
        for layer in layers(kv):
            write(file, tensors_of(layer))

    def _load(self, file: BinaryIO) -> KV:
        identity = self._identity()
        if file.read(len(identity)) != identity:
            raise ValueError("the KV cache is that of another model or version of transformers")
        device = self.model.device
        saved = read(file, device)
        count = int(saved.pop("length"))
        kv = cache = self._create()
        if isinstance(kv, CountedCache):
            cache, kv.count = kv.cache, count
            for at, number in sorted(
                (int(at), int(number)) for at, number in map(str.split, saved)
            ):
                kv.checkpoints.setdefault(at, []).append(saved[f"{at} {number}"])
        for layer in layers(cast("Cache", cache)):
            fill(layer, read(file, device), count)
        return kv

    def _identity(self) -> bytes:
        """Return a digest of what a KV cache depends on, with samples of all weights."""
        config = {**self.model.config.to_dict(), "_name_or_path": ""}
        facts = transformers.__version__, self._kinds, sorted(config.items())
        digest = blake2b(repr(facts).encode(), digest_size=16)
        for name, weights in self.model.named_parameters():
            digest.update(repr((name, weights.dtype, weights.shape)).encode())
            sample = weights.detach().flatten()[:: weights.numel() // 8 + 1].contiguous()
            digest.update(bytes(cast("list[int]", sample.view(torch.uint8).tolist())))
        return digest.digest()

    def _key(self, count: int) -> str:
        return "long" if self._rope_limit is not None and count > self._rope_limit else ""

    def _check(self, tokens: Sequence[int]) -> list[int]:
        ids = [index(token) for token in tokens]
        size = self._config("vocab_size")
        for place, token in enumerate(ids):
            if not 0 <= token < size:  # The token itself does not belong in a log.
                raise ValueError(f"token {place} (from 0) is not in the vocabulary of {size}")
        return ids

    def _check_room(self, state: BorrowedState[KV], new_tokens: int) -> None:
        count = len(state.token_history)
        if new_tokens and not count:
            raise ValueError("nothing to decode from: the session is empty, prefill it first")
        if count + new_tokens > self._most:
            raise ValueError(f"{count + new_tokens} tokens do not fit in a context of {self._most}")

    def _check_generate(self, count: int, new_tokens: int) -> None:
        if not self._attention:
            raise ValueError("model.generate needs attention layers to go on from a cache: decode")
        limit = self._rope_limit
        if limit is not None and count < limit + 2 and count + new_tokens > limit + 1:
            raise ValueError(
                f"model.generate drops the cache when its keys change after {limit} tokens: "
                f"decode from {count} to {limit + 2}"
            )

    def _config(self, name: str) -> int:
        return int(getattr(self.model.config.get_text_config(), name, sys.maxsize))


def feeding(kv: KV, tokens: int) -> AbstractContextManager[Cache]:
    """Give the cache to the model, to be fed a number of tokens."""
    return kv.feed(tokens) if isinstance(kv, CountedCache) else nullcontext(kv)


def _longrope_limit(config: Any) -> int | None:
    """Return the number of tokens beyond which all keys change, or None."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if rope is None or "longrope" not in {rope.get("rope_type"), rope.get("type")}:
        return None
    name = "original_max_position_embeddings"
    return int(rope.get(name) or getattr(config, name))


@torch.no_grad()
def random_llama(seed: int, *, vocab_size: int = 128) -> LlamaForCausalLM:
    """Return a small Llama with random weights, to test with: four layers, a context of 512.

    The weights are larger than by default, where the output hardly depends on the input, and let
    attention spread, so every token affects the output. Numbers are float64, so the size of chunks
    does not.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                initializer_range=0.3,
                bos_token_id=None,
                eos_token_id=None,
            )
        ).double()
    for layer in model.model.layers:
        attention = cast("LlamaDecoderLayer", layer).self_attn
        attention.q_proj.weight *= 0.2
        attention.o_proj.weight *= 3
    return model
