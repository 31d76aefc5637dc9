"""An engine over Hugging Face transformers: any causal LM with attention, a `DynamicCache` a session.

pip install torch==2.13.0
pip install transformers==5.23.0
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import index
from typing import Any, cast

from inference_session import Session
from inference_session.engine import BorrowedState, DecodeResult, PrefillResult, StateSlots
from inference_session.exceptions import SessionClosedError


try:
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"no {error.name}: install it with `pip install torch==2.13.0` and then "
        "`pip install transformers==5.23.0`",
        name=error.name,
    ) from error


# The KV cache, as plain functions

RAGGED = sys.maxsize
"""The length of a cache whose layers do not agree: never what is expected, always worth a cut."""


def length(cache: DynamicCache) -> int:
    """Return how many tokens all layers cover, or `RAGGED`; `get_seq_length()` asks one of them."""
    lengths = {_layer_length(cast("DynamicLayer", layer)) for layer in cache.layers}
    return lengths.pop() if len(lengths) == 1 else RAGGED


def _layer_length(layer: DynamicLayer) -> int:
    keys, values = layer.keys, layer.values  # (1, heads, tokens, head size)
    if keys is None or values is None:
        return 0  # Never fed.
    if keys.shape[:-1] != values.shape[:-1] or len(keys) != 1:
        return RAGGED  # Torn between the two, or more than one sequence.
    return layer.get_seq_length()


def truncate(cache: DynamicCache, length: int) -> DynamicCache:
    """Keep the first `length` tokens: every layer gives up what it has too much.

    `crop` gets a negative number, of tokens to give up. A positive one, of tokens to keep, is for
    transformers 4 only; and 0 asks for nothing, but means "keep none" there.
    """
    for layer in cast("list[DynamicLayer]", cache.layers):
        excess = layer.get_seq_length() - length
        if excess > 0:
            layer.crop(-excess)
    return cache


def nbytes(cache: DynamicCache) -> int:
    """Return the bytes that a cache keeps alive: a cropped tensor is a view of all that it was."""
    layers = cast("list[DynamicLayer]", cache.layers)
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)


# The engine


class TransformersEngine:
    """An `inference_session.engine.Engine`: any number of sessions, and a model that they share.

    Between calls the last token of a session is always pending, so there is something to compute
    the next one from. Every call feeds all that is pending, whatever the reason, and is atomic.
    The errors of `StateSlots.borrow` come from all of them.
    """

    def __init__(self, model: PreTrainedModel, *, chunk: int = 256) -> None:
        """Serve `model`; at most `chunk` tokens go through it at once."""
        kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
        if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:  # A state that has no length.
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise ValueError(f"only attention can tell what its KV cache covers; this has {names}")
        self.model: PreTrainedModel = model.eval()  # type: ignore[no-untyped-call]
        self.chunk = chunk
        self.slots = StateSlots(
            create=lambda: DynamicCache(config=model.config),
            length=length,
            # What has slid out of a window is gone: such a cache is computed anew.
            truncate=truncate if kinds == {DynamicLayer} else None,
            nbytes=nbytes,
        )

    def prefill(self, session: Session, tokens: Sequence[int], /) -> PrefillResult:
        """Add tokens, and feed all but the last; `ValueError` if the model cannot take them."""
        new = self._check(tokens)
        with self.slots.borrow(session) as state:
            state.append(new)
            self._check_room(state, 0)
            self._feed_all_but_last(session, state)
        return PrefillResult(tokens_processed=len(new))

    def prompt(self, session: Session, tokens: Sequence[int], /) -> int:
        """Make `tokens` the whole history; return how many of them the KV cache had already."""
        history = self._check(tokens)
        with self.slots.borrow(session) as state:
            reused = state.reuse_prefix(history)
            self._check_room(state, 0)
            self._feed_all_but_last(session, state)
        return reused

    def decode(self, session: Session, /) -> DecodeResult:
        """Add the likeliest token; `ValueError` if the session is empty or its context full."""
        with self.slots.borrow(session) as state:
            self._check_room(state, 1)
            self._feed_all_but_last(session, state)
            token = int(self._feed(state, state.pending).argmax())
            state.append([token])
        return DecodeResult(token=token)

    def generate(self, session: Session, max_new_tokens: int, /, **options: object) -> list[int]:
        """Add what `model.generate` makes of the session, all of it or nothing, and return it.

        `options` go to `model.generate`; it must follow one sequence only, not several beams.
        """
        with self.slots.borrow(session) as state:
            self._check_room(state, max_new_tokens)
            self._feed_all_but_last(session, state)
            history = torch.tensor([state.token_history[:]], device=self.model.device)
            sequences = cast("Any", self.model).generate(
                history,
                attention_mask=torch.ones_like(history),
                past_key_values=state.kv_cache,
                max_new_tokens=max_new_tokens,
                **options,
            )
            new: list[int] = sequences[0, history.shape[1] :].tolist()
            state.append(new)
            state.advance(len(new))  # What was pending and all new ones but the last were fed.
        return new

    def _feed_all_but_last(self, session: Session, state: BorrowedState[DynamicCache]) -> None:
        if not state.pending:
            state.rewind(len(state.token_history))  # Forgets no token, but uncovers one.
        while len(pending := state.pending) > 1:
            if session.closed:  # Nobody waits for the rest.
                raise SessionClosedError(session.id)
            self._feed(state, pending[: min(self.chunk, len(pending) - 1)])

    @torch.no_grad()
    def _feed(self, state: BorrowedState[DynamicCache], tokens: Sequence[int]) -> torch.Tensor:
        """Feed the next pending tokens; return the logits (vocabulary size,) after the last."""
        output = self.model(
            input_ids=torch.tensor([tokens], device=self.model.device),
            past_key_values=state.kv_cache,
            use_cache=True,
            logits_to_keep=1,
        )
        state.advance(len(tokens))
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def _check(self, tokens: Sequence[int]) -> list[int]:
        ids = [index(token) for token in tokens]
        size = self._config("vocab_size")
        for place, token in enumerate(ids):
            if not 0 <= token < size:  # What it is does not belong in a log.
                raise ValueError(f"token {place} (from 0) is not in the vocabulary of {size}")
        return ids

    def _check_room(self, state: BorrowedState[DynamicCache], new_tokens: int) -> None:
        count, most = len(state.token_history), self._config("max_position_embeddings")
        if new_tokens and not count:
            raise ValueError("nothing to decode from: the session is empty, prefill it first")
        if count + new_tokens > most:
            raise ValueError(f"{count + new_tokens} tokens do not fit in a context of {most}")

    def _config(self, name: str) -> int:
        return int(getattr(self.model.config.get_text_config(), name, sys.maxsize))


@torch.no_grad()
def random_llama(seed: int, *, vocab_size: int = 128) -> LlamaForCausalLM:
    """Return a small Llama with random weights, to test with: four layers, a context of 512.

    The weights are larger than the default, with which output hardly depends on input, and let
    attention spread, so that every token shows. Numbers are float64, so that how many tokens are
    fed at once does not.
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
