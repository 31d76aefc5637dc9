"""The engine over MLX: every layer counts, nothing is left to be computed later, any thread may step.

So for models whose KV cache can be cut anywhere, and for those with sliding windows or recurrent states.
"""

# MLX and mlx-lm are typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import gc
import importlib
import io
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx_lm.models import falcon_h1, lfm2, llama4, mamba2, qwen3_next
from mlx_lm.models.cache import ConcatenateKVCache, QuantizedKVCache, trim_prompt_cache
from mlx_lm.models.llama import Model, TransformerBlock
from tests.saving import Saving, check_computed_anew, go_on_elsewhere, saved
from tests.serving import (
    OTHER,
    PROMPT,
    PROMPTS,
    VOCAB_SIZE,
    Serving,
    answer,
    decode,
    look,
)

from inference_session import Session
from inference_session.engine import TORN, BorrowedState
from inference_session.exceptions import (
    SessionBusyError,
    SessionClosedError,
    StateMismatchError,
)
from inference_session.testing import check_engine, parametrize_with_checks
from mlx_engine import (
    Cache,
    LanguageModel,
    LayerCache,
    MLXEngine,
    random_model,
    with_random_weights,
)


NUM_LAYERS = 3


@pytest.fixture(scope="module", autouse=True)
def cpu() -> None:
    """Have it all on the CPU, also where there is a GPU."""
    mx.set_default_device(mx.Device(mx.DeviceType.cpu))


@pytest.fixture
def model() -> Model:
    """Give a small model."""
    return shared_model()


@pytest.fixture
def engine(model: Model) -> MLXEngine:
    """Give an engine."""
    return MLXEngine(model, chunk=16)


@cache
def shared_model() -> Model:
    """Return a small model; its weights never change."""
    return random_model(1, vocab_size=VOCAB_SIZE, num_layers=NUM_LAYERS)


@parametrize_with_checks(lambda: MLXEngine(shared_model(), chunk=4), vocab_size=VOCAB_SIZE)
def test_kit(check: Callable[[], None]) -> None:
    """The engine keeps every promise of `inference_session.testing`."""
    check()


def layers(engine: MLXEngine, session: Session) -> list[int]:
    """Return how many tokens each layer has cached of a session."""
    with engine.slots.borrow(session) as state:
        return [layer.offset for layer in state.kv_cache.layers]


# What a session says does not depend on how it is served


class TestServing(Serving):
    """What a session says does not depend on how it is served."""


def test_tokens_are_those_of_the_model(engine: MLXEngine) -> None:
    """Prefill and decode together are greedy decoding by the model without a cache."""
    expected: list[int] = []
    for _ in range(10):
        logits = engine.model(mx.array([PROMPT + expected]))[0, -1]
        expected.append(cast("int", mx.argmax(logits).item()))
    assert answer(engine, PROMPT, 10) == expected
    assert len(set(expected)) > 5


def test_logits_depend_on_every_token(model: Model) -> None:
    """The random model is worth testing with: no token of the prompt can be lost unseen."""
    logits = model(mx.array([PROMPT]))[0, -1]
    for position, token in enumerate(PROMPT):
        other = [*PROMPT[:position], (token + 1) % VOCAB_SIZE, *PROMPT[position + 1 :]]
        difference = mx.abs(model(mx.array([other]))[0, -1] - logits)
        assert cast("float", difference.max().item()) > 0.1


def test_cache_grows_beyond_its_first_buffer(engine: MLXEngine) -> None:
    """mlx-lm makes room for 256 tokens at a time, and a cut across that border doesn't show."""
    prompt = (PROMPT * 7)[:255]
    with Session() as session:
        engine.prefill(session, prompt)
        first = decode(engine, session, 10)
        assert engine.prompt(session, prompt) == len(prompt) - 1
        assert decode(engine, session, 10) == first


def test_nbytes(engine: MLXEngine) -> None:
    """The bytes of a session are those of the buffers of all layers."""
    with Session() as session:
        engine.prefill(session, PROMPT)
        with engine.slots.borrow(session) as state:
            nbytes = engine.slots.nbytes
            assert nbytes is not None
            # keys and values, heads, dimensions, tokens there's room for, bytes of a float32
            assert nbytes(state.kv_cache) == NUM_LAYERS * 2 * 2 * 8 * 256 * 4
            assert nbytes(engine.slots.create()) == 0


# Every layer counts


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_layers_that_disagree_are_found_out(engine: MLXEngine, layer: int) -> None:
    """A layer that has fewer tokens than the others, be it the last, is never decoded from."""
    with Session() as session:
        engine.prefill(session, PROMPT)
        with pytest.raises(StateMismatchError) as error, engine.slots.borrow(session) as state:
            state.kv_cache.layers[layer].trim(3)
        assert (error.value.expected, error.value.actual) == (39, TORN)
        assert look(engine, session) == (PROMPT, 0)
        assert decode(engine, session, 10) == answer(engine, PROMPT, 10)


def test_truncate_brings_all_layers_to_one_length(engine: MLXEngine) -> None:
    """Layers that disagree are cut to what all of them have; mlx-lm would trim each by as much as the first."""
    caches = engine.slots.create()
    with caches.step(40):
        engine.model(mx.array([PROMPT]), cache=caches.layers)
    assert caches.truncate(41).length() == 40
    caches.layers[2].trim(5)
    assert caches.length() == TORN
    assert caches.truncate(35).length() == 35
    assert [layer.offset for layer in caches.layers] == [35, 35, 35]
    caches.layers[1].trim(5)
    assert caches.truncate(34).length() == 0


def test_trimming_behind_the_session_is_found_out(engine: MLXEngine) -> None:
    """All layers agree, but not with the history."""
    with Session() as session:
        engine.prefill(session, PROMPT)
        with pytest.raises(StateMismatchError) as error, engine.slots.borrow(session) as state:
            trim_prompt_cache(list(state.kv_cache.layers), 100)
        assert (error.value.expected, error.value.actual) == (39, TORN)
        assert decode(engine, session, 10) == answer(engine, PROMPT, 10)


# Failure


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
@pytest.mark.parametrize("call", ["decode", "prefill", "prompt"])
@pytest.mark.parametrize("failure", [MemoryError, KeyboardInterrupt])
def test_failed_step_leaves_no_trace(
    engine: MLXEngine,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    layer: int,
    failure: type[BaseException],
) -> None:
    """A step that fails half-way, in some layers and not in others, succeeds when tried again."""
    steps: dict[str, Callable[[], object]] = {
        "decode": lambda: engine.decode(session),
        "prefill": lambda: engine.prefill(session, OTHER),
        "prompt": lambda: engine.prompt(session, PROMPT[:30] + OTHER),
    }
    forward = TransformerBlock.__call__

    def fail(
        block: TransformerBlock, x: mx.array, mask: mx.array | None, cache: LayerCache
    ) -> mx.array:
        output = forward(block, x, mask, cache=cache)
        if block is shared_model().layers[layer]:
            raise failure
        return output

    with Session() as session:
        engine.prefill(session, PROMPT)
        with monkeypatch.context() as patch:
            patch.setattr(TransformerBlock, "__call__", fail)
            with pytest.raises(failure):
                steps[call]()
        tokens, cached = look(engine, session)
        assert tokens == PROMPT
        assert layers(engine, session) == [cached] * NUM_LAYERS
        assert decode(engine, session, 10) == answer(engine, PROMPT, 10)


def test_step_that_was_not_evaluated_leaves_no_trace(
    engine: MLXEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where evaluation fails, the cache holds what is yet to be computed; any thread can go on with it."""

    def fail(*arrays: object) -> None:
        raise MemoryError

    with Session() as session:
        engine.prefill(session, PROMPT)
        before = look(engine, session)
        with monkeypatch.context() as patch:
            patch.setattr(mx, "eval", fail)
            thread = Thread(lambda: engine.prefill(session, OTHER))
            with pytest.raises(MemoryError):
                thread.result()
        assert look(engine, session) == before
        assert decode(engine, session, 10) == answer(engine, PROMPT, 10)


def test_steps_are_evaluated(engine: MLXEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step evaluates the caches of all layers, or errors would come up in someone else's."""
    evaluated: list[int] = []
    evaluate = mx.eval

    def count(token: mx.array, states: list[tuple[mx.array, mx.array, int]]) -> None:
        evaluated.append(len(states))
        evaluate(token, states)

    monkeypatch.setattr(mx, "eval", count)
    answer(engine, PROMPT, 4)
    assert evaluated == [NUM_LAYERS] * (3 + 4)


def test_closing_stops_a_long_prefill(engine: MLXEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that is closed in mid-step is not fed the rest."""
    session = Session()
    evaluate = mx.eval
    calls: list[int] = []

    def close(*arrays: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            session.close()
        evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", close)
    with pytest.raises(SessionClosedError):
        engine.prefill(session, PROMPT * 5)
    assert len(calls) == 2


# Windows and recurrent states


def sliding(window: int) -> LanguageModel:
    """Return a model that attends to a window in every other layer."""
    args = replace(
        random_model(1).args,
        num_hidden_layers=4,
        layer_types=["full_attention", "sliding_attention"] * 2,
        sliding_window=window,
    )
    return with_random_weights(Model(args), 9)


def short_convolutions() -> LanguageModel:
    """Return an LFM2."""
    args = lfm2.ModelArgs(
        model_type="lfm2",
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        norm_eps=1e-5,
        conv_bias=False,
        conv_L_cache=3,
        block_dim=32,
        block_multiple_of=8,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=False,
        block_ff_dim=64,
        rope_theta=100.0,
        full_attn_idxs=[1, 3],
    )
    return with_random_weights(lfm2.Model(args), 1)


def gated_delta() -> LanguageModel:
    """Return a Qwen3-Next, which remembers for long."""
    args = qwen3_next.ModelArgs(
        model_type="qwen3_next",
        hidden_size=32,
        num_hidden_layers=4,
        intermediate_size=64,
        num_attention_heads=4,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_conv_kernel_dim=4,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        shared_expert_intermediate_size=32,
        mlp_only_layers=[0, 2],
        moe_intermediate_size=32,
        rms_norm_eps=1e-5,
        vocab_size=VOCAB_SIZE,
        num_key_value_heads=2,
        rope_theta=100.0,
        partial_rotary_factor=0.5,
        max_position_embeddings=1024,
        head_dim=8,
        norm_topk_prob=True,
        full_attention_interval=2,
    )
    model = with_random_weights(qwen3_next.Model(args), 1)
    for layer in model.layers:
        if layer.is_linear:
            layer.linear_attn.A_log = SLOW_DECAY
    return model


def state_space() -> LanguageModel:
    """Return a Mamba2, which remembers for long."""
    args = mamba2.ModelArgs(
        model_type="mamba2",
        num_heads=4,
        head_dim=16,
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        state_size=16,
        num_hidden_layers=3,
        layer_norm_epsilon=1e-5,
        conv_kernel=4,
        n_groups=1,
        use_bias=False,
        use_conv_bias=False,
        tie_word_embeddings=False,
        time_step_limit=(0.0, float("inf")),
        time_step_rank="auto",
    )
    model = with_random_weights(mamba2.Model(args), 1)
    for layer in model.layers:
        layer.mixer.A_log = SLOW_DECAY
    return model


def parallel_heads() -> LanguageModel:
    """Return a Falcon-H1, each layer of which has both a recurrent state and an attention."""
    args = falcon_h1.ModelArgs(
        head_dim=8,
        hidden_size=32,
        intermediate_size=64,
        mamba_d_head=16,
        mamba_d_ssm=64,
        mamba_d_state=16,
        mamba_n_heads=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        vocab_size=VOCAB_SIZE,
        tie_word_embeddings=False,
        rope_theta=100.0,
        lm_head_multiplier=1.0,
    )
    return with_random_weights(falcon_h1.Model(args), 1)  # type: ignore[no-untyped-call]


SLOW_DECAY = mx.log(mx.array([0.01, 0.05, 0.1, 0.2]))
mx.eval(SLOW_DECAY)  # Else the first thread to need it would have to compute it.

LOSSY: dict[str, Callable[[], LanguageModel]] = {
    "window-16": partial(sliding, 16),
    "window-100": partial(sliding, 100),
    "lfm2": short_convolutions,
    "qwen3-next": gated_delta,
    "mamba2": state_space,
    "falcon-h1": parallel_heads,
}
"""Models whose KV cache can't be cut just anywhere. One window slides in all tests, one in long ones only."""

RECURRENT = ["lfm2", "qwen3-next", "mamba2", "falcon-h1"]

LONG: list[int] = [(7 * i * i + 3 * i) % VOCAB_SIZE for i in range(240)]


@cache
def lossy_model(kind: str) -> LanguageModel:
    """Return a model; its weights never change."""
    return LOSSY[kind]()


@pytest.mark.parametrize("kind", LOSSY)
class TestLossyServing(Serving):
    """What a session says does not depend on how it is served, whatever the layers can forget."""

    @pytest.fixture
    def engine(self, kind: str) -> MLXEngine:
        """Give an engine."""
        return MLXEngine(lossy_model(kind), chunk=16)

    def test_tokens_are_those_of_the_model(self, engine: MLXEngine) -> None:
        """Decoding with windows and states is greedy decoding by the model without any, beyond a checkpoint."""
        expected: list[int] = []
        for _ in range(36):
            logits = engine.model(mx.array([PROMPT + expected]))[0, -1]
            expected.append(cast("int", mx.argmax(logits).item()))
        assert answer(engine, PROMPT, 36) == expected
        assert len(set(expected)) > 5

    def test_logits_depend_on_every_token(self, engine: MLXEngine) -> None:
        """The random model is worth testing with: no token of the prompt can be lost unseen."""
        logits = engine.model(mx.array([PROMPT]))[0, -1]
        for position, token in enumerate(PROMPT):
            other = [*PROMPT[:position], (token + 1) % VOCAB_SIZE, *PROMPT[position + 1 :]]
            difference = mx.abs(engine.model(mx.array([other]))[0, -1] - logits)
            assert cast("float", difference.max().item()) > 0.1

    def check_reused(self, reused: int, common: int) -> None:
        """Where it can't be cut, it's reused as far as there is a checkpoint."""
        assert reused in (common, common // 16 * 16, 32)
        assert reused <= common


@pytest.mark.parametrize("kind", ["window-16", "window-100", "lfm2", "qwen3-next", "mamba2"])
def test_kit_for_lossy(kind: str) -> None:
    """The engine keeps its promises for windows and recurrent states, too."""
    model = lossy_model(kind)
    check_engine(lambda: MLXEngine(model, chunk=4), vocab_size=VOCAB_SIZE, max_examples=3)


@pytest.mark.parametrize("kind", LOSSY)
@pytest.mark.parametrize("call", ["decode", "prefill"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_failed_step_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, kind: str, call: str, layer: int
) -> None:
    """A step that fails when some states have moved on and others haven't is taken back by all of them."""
    engine = MLXEngine(lossy_model(kind), chunk=16)
    blocks = cast("Any", engine.model).layers
    kind_of_block: type = type(blocks[layer])
    forward = cast("Callable[..., mx.array]", kind_of_block.__call__)

    def fail(block: object, *args: object, **kwargs: object) -> mx.array:
        output = forward(block, *args, **kwargs)
        if block is blocks[layer]:
            raise MemoryError
        return output

    with Session() as session:
        engine.prefill(session, PROMPT)
        begun = decode(engine, session, 3)
        with monkeypatch.context() as patch:
            patch.setattr(kind_of_block, "__call__", fail)
            with pytest.raises(MemoryError):
                engine.decode(session) if call == "decode" else engine.prefill(session, OTHER)
        tokens, covered = look(engine, session)
        assert tokens == PROMPT + begun
        assert covered == (42 if kind == "window-100" else 32 if call == "decode" else 42)
        assert begun + decode(engine, session, 10) == answer(engine, PROMPT, 13)


@pytest.mark.parametrize("kind", LOSSY)
def test_step_whose_borrow_fails_is_taken_back(kind: str) -> None:
    """Where the model ran to its end, and something else failed, its states don't stay ahead of the history."""
    engine = MLXEngine(lossy_model(kind), chunk=16)

    def fail(tokens: list[int]) -> None:
        with engine.slots.borrow(session) as state:
            state.append(tokens)
            engine.feed(state, state.pending)
            raise MemoryError

    with Session() as session:
        engine.prefill(session, PROMPT)
        for tokens in ([3], OTHER):
            with pytest.raises(MemoryError):
                fail(tokens)
            assert look(engine, session)[0] == PROMPT
            assert decode(engine, session, 5) == answer(engine, PROMPT, 5)
            with engine.slots.borrow(session) as state:
                state.rewind(len(PROMPT))


class Counting(MLXEngine):
    """An engine that counts the tokens that it feeds."""

    fed = 0

    def feed(self, state: BorrowedState[Cache], tokens: Sequence[int]) -> list[int]:
        """Feed them and count."""
        self.fed += len(tokens)
        return super().feed(state, tokens)


@pytest.mark.parametrize("kind", LOSSY)
def test_next_turn_feeds_tens_of_tokens(kind: str) -> None:
    """A turn that departs from the last answer goes on from a checkpoint, not from nothing."""
    engine = Counting(lossy_model(kind))
    with Session() as session:
        engine.prefill(session, LONG)
        old = LONG + decode(engine, session, 60)
        assert engine.fed == 239 + 60
        for common, reused in ((290, 271), (260, 239)):
            engine.fed = 0
            turn = old[:common] + OTHER
            assert engine.prompt(session, turn) == reused
            assert engine.fed == common - reused + len(OTHER) - 1
            assert decode(engine, session, 5) == answer(engine, turn, 5)


def speculate(engine: MLXEngine, session: Session, guesses: Sequence[int]) -> list[int]:
    """Add those of the guesses that are right, and the token after them."""
    with engine.slots.borrow(session) as state:
        engine.feed_all_but_last(state)
        length = len(state.token_history)
        state.append(guesses)
        choices = engine.feed(state, state.pending)
        right = [guess == choice for guess, choice in zip(guesses, choices, strict=False)]
        kept = [*right, False].index(False)
        state.rewind(length + kept, pending=0)
        state.append([choices[kept]])
    return choices[: kept + 1]


@pytest.mark.parametrize("kind", LOSSY)
def test_speculation_feeds_few_tokens(kind: str) -> None:
    """A guess that is rejected costs the tokens since the guesses began, not all of the history."""
    engine = Counting(lossy_model(kind))
    expected = answer(engine, LONG, 80)
    with Session() as session:
        engine.prefill(session, LONG)
        engine.fed = 0
        tokens: list[int] = []
        for turn in range(25):
            right = turn % 5
            guesses = expected[len(tokens) :][:4]
            wrong = [(token + 1) % VOCAB_SIZE for token in guesses[right:]]
            tokens += speculate(engine, session, guesses[:right] + wrong)
    assert tokens == expected[:75]
    # In each turn, the last token and four guesses; and once more what was right of the turn before, and the
    # token before that, unless all was right.
    assert engine.fed == 25 * 5 + 5 * (1 + 2 + 3 + 4) == 175


@pytest.mark.parametrize("kind", LOSSY)
def test_checkpoints_stay_as_they_are(kind: str) -> None:
    """Tokens decoded after a checkpoint, or after going back to it, aren't written into it."""
    engine = MLXEngine(lossy_model(kind))
    with Session() as session:
        engine.prefill(session, LONG)
        old = LONG + decode(engine, session, 60)
        for token in PROMPT[:3]:
            turn = [*old[:271], token]
            assert engine.prompt(session, turn) == 271
            assert decode(engine, session, 20) == answer(engine, turn, 20)


@pytest.mark.parametrize("kind", LOSSY)
def test_checkpoints_go_with_the_history(kind: str) -> None:
    """A checkpoint of tokens that were taken back isn't gone back to when as many others were fed."""
    engine = MLXEngine(lossy_model(kind))
    with Session() as session:
        engine.prefill(session, LONG)
        decode(engine, session, 1)  # at 239, there's a checkpoint
        other = LONG[:60] + LONG[:190]
        engine.prompt(session, other)
        decode(engine, session, 1)
        turn = [*other[:245], 3]
        engine.prompt(session, turn)
        assert decode(engine, session, 10) == answer(engine, turn, 10)


@pytest.mark.parametrize("kind", RECURRENT)
def test_checkpoints_are_bounded(kind: str) -> None:
    """There are never more than there may be, of all ages, and their bytes are counted."""

    def nbytes(engine: MLXEngine, session: Session, length: int) -> int:
        engine.prompt(session, LONG[:length])
        with engine.slots.borrow(session) as state:
            return state.kv_cache.nbytes()

    model = lossy_model(kind)
    with Session() as bare:
        least = nbytes(MLXEngine(model, chunk=16, checkpoints=0), bare, 100)
    engine = MLXEngine(model, chunk=16, checkpoints=4)
    with Session() as session:
        found = [nbytes(engine, session, length) for length in (100, 200, 240)]
        assert found[0] == found[1] == found[2] > least > 0
        with engine.slots.borrow(session) as state:
            reached: list[int] = []
            for length in (230, 210, 150, 20):
                state.rewind(length)
                reached.append(state.kv_length)
    assert reached == [215, 195, 115, 0]


def test_checkpoints_take_no_more_memory_than_they_say() -> None:
    """A state that is the end of what went through a convolution doesn't keep the rest of it."""
    engine = MLXEngine(lossy_model("lfm2"))
    nbytes = engine.slots.nbytes
    assert nbytes is not None
    with Session() as session:
        gc.collect()
        before = mx.get_active_memory()
        engine.prefill(session, LONG)
        decode(engine, session, 1)
        with engine.slots.borrow(session) as state:
            assert mx.get_active_memory() - before < nbytes(state.kv_cache) + 20_000


@pytest.mark.parametrize("kind", LOSSY)
def test_no_checkpoints(kind: str) -> None:
    """Without any, nothing is wrong; only, all is fed again."""
    model = lossy_model(kind)
    engine = MLXEngine(model, chunk=16, checkpoints=0)
    with Session() as session:
        engine.prefill(session, PROMPT)
        decode(engine, session, 3)
        reused = engine.prompt(session, PROMPT[:30] + OTHER)
        assert reused == (30 if kind == "window-100" else 0)
        assert decode(engine, session, 5) == answer(engine, PROMPT[:30] + OTHER, 5)


def test_chunked_attention() -> None:
    """mlx-lm says that a Llama 4 can be trimmed, also where the tokens needed for that were dropped."""
    sizes = {
        "attention_bias": False,
        "attention_chunk_size": 32,
        "head_dim": 8,
        "hidden_size": 32,
        "interleave_moe_layer_step": 2,
        "intermediate_size": 64,
        "intermediate_size_mlp": 64,
        "max_position_embeddings": 1024,
        "model_type": "llama4",
        "num_attention_heads": 4,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 100.0,
        "use_qk_norm": True,
        "vocab_size": VOCAB_SIZE,
    }
    args = llama4.ModelArgs(model_type="llama4", text_config=sizes)
    engine = MLXEngine(with_random_weights(llama4.Model(args), 1), chunk=8)
    with Session() as session:
        engine.prefill(session, LONG[:30])
        assert engine.prompt(session, LONG[:20] + OTHER) == 20
        assert decode(engine, session, 5) == answer(engine, LONG[:20] + OTHER, 5)
        engine.prompt(session, LONG[:70])
        assert engine.prompt(session, LONG[:58] + OTHER) == 52
        assert decode(engine, session, 5) == answer(engine, LONG[:58] + OTHER, 5)


@pytest.mark.parametrize(
    ("new_cache", "reused"), [(partial(QuantizedKVCache, 32, 8), 30), (ConcatenateKVCache, 16)]
)
def test_other_caches(new_cache: Callable[[], LayerCache], reused: int) -> None:
    """Quantized caches can be cut anywhere; of a kind that isn't known, `trim` isn't trusted, and here lies."""
    args = replace(random_model(1).args, hidden_size=128, num_hidden_layers=2)
    model = with_random_weights(Model(args), 1)
    engine = MLXEngine(model, chunk=16, cache=lambda: [new_cache() for _ in model.layers])
    with Session() as session:
        engine.prefill(session, PROMPT)
        decode(engine, session, 3)
        assert engine.prompt(session, PROMPT[:30] + OTHER) == reused
        assert decode(engine, session, 5) == answer(engine, PROMPT[:30] + OTHER, 5)


# Files and branches


class TestSaving(Saving):
    """A session goes on the same in a file and in a branch."""


@pytest.mark.parametrize("kind", LOSSY)
class TestLossySaving(Saving):
    """A session goes on the same in a file and in a branch, whatever the layers can forget."""

    @pytest.fixture
    def engine(self, kind: str) -> MLXEngine:
        """Give an engine."""
        return MLXEngine(lossy_model(kind), chunk=16)

    def check_shared(self, covered: int, most: int) -> None:
        """Where it can't be cut, it's shared as far as there is a checkpoint."""
        assert covered in (most, most // 16 * 16, 39)
        assert covered <= most

    def test_file_has_checkpoints(self, engine: MLXEngine, tmp_path: Path) -> None:
        """A session from a file goes back as far as the one that was saved."""
        with Session() as session:
            engine.prefill(session, PROMPT)
            decode(engine, session, 5)
            engine.slots.save(session, tmp_path / "session")
            found: list[int] = []
            for other in session, engine.slots.restore(tmp_path / "session"):
                with other:
                    found.append(engine.prompt(other, PROMPT[:36] + OTHER))
        assert found[0] == found[1] >= 32


def test_restored_elsewhere(engine: MLXEngine, tmp_path: Path) -> None:
    """A session goes on in another process, and needs nothing of this one."""
    tokens, expected = saved(engine, tmp_path / "session")
    code = f"""
import mlx.core as mx
from mlx_engine import MLXEngine, random_model
mx.set_default_device(mx.Device(mx.DeviceType.cpu))
engine = MLXEngine(random_model(1, vocab_size={VOCAB_SIZE}, num_layers={NUM_LAYERS}))
"""
    assert go_on_elsewhere(code, tmp_path / "session") == [len(tokens) - 1, *expected]


def quantized(bits: int) -> MLXEngine:
    """Return an engine with quantized caches."""
    args = replace(random_model(1).args, hidden_size=128, num_hidden_layers=2)
    model = with_random_weights(Model(args), 1)
    new_cache = partial(QuantizedKVCache, 32, bits)
    return MLXEngine(model, chunk=16, cache=lambda: [new_cache() for _ in model.layers])


class TestQuantizedSaving(Saving):
    """A session goes on the same in a file and in a branch, with quantized caches."""

    @pytest.fixture
    def engine(self) -> MLXEngine:
        """Give such an engine."""
        return quantized(8)


OTHERS: dict[str, Callable[[], MLXEngine]] = {
    "weights": lambda: MLXEngine(random_model(2, num_layers=NUM_LAYERS)),
    "layers": lambda: MLXEngine(random_model(1, num_layers=NUM_LAYERS + 1)),
    "windows": lambda: MLXEngine(lossy_model("window-16")),
    "states": lambda: MLXEngine(lossy_model("mamba2")),
    "quantized": lambda: quantized(4),
}


@pytest.mark.parametrize("other", OTHERS)
def test_file_of_another_model(
    engine: MLXEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture, other: str
) -> None:
    """A KV cache is taken only by the model, and the kind of cache, it was computed with."""
    saved(engine, tmp_path / "session")
    check_computed_anew(OTHERS[other](), tmp_path / "session", caplog, "load raised ValueError")


def test_file_of_other_precision(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same model with caches of eight and of four bits is two."""
    saved(quantized(8), tmp_path / "session")
    check_computed_anew(quantized(4), tmp_path / "session", caplog, "load raised ValueError")


@pytest.mark.parametrize("size", [0, 10, 16, 20, 30, 100, 1000, -1])
def test_file_that_ends_early(engine: MLXEngine, size: int) -> None:
    """A file cut off anywhere is an error, never a cache with a part of the layers."""
    file = io.BytesIO()
    with Session() as session:
        engine.prefill(session, PROMPT)
        with engine.slots.borrow(session) as state:
            engine._dump(state.kv_cache, file)
    with pytest.raises((RuntimeError, ValueError, struct.error)):
        engine._load(io.BytesIO(file.getvalue()[:size]))


def test_file_has_nothing_that_was_taken_back(engine: MLXEngine, tmp_path: Path) -> None:
    """Tokens that a session forgot are in no file, though mlx-lm leaves them in its arrays."""
    sizes: list[int] = []
    for count in 20, 250:
        with Session() as session:
            engine.prefill(session, (PROMPT * 7)[:count])
            engine.prompt(session, PROMPT[:20])
            engine.slots.save(session, tmp_path / "session")
            sizes.append((tmp_path / "session").stat().st_size)
    assert sizes[0] == sizes[1]


def test_branch_takes_no_memory(engine: MLXEngine) -> None:
    """A branch shares arrays, until it grows."""
    with Session() as session:
        engine.prefill(session, PROMPT)
        with engine.slots.borrow(session) as state:
            before = mx.get_active_memory()
            with state.branch() as child:
                assert mx.get_active_memory() == before
                engine.decode(child)
                nbytes = state.kv_cache.nbytes()
                assert mx.get_active_memory() >= before + nbytes


# Threads


class Thread(threading.Thread):
    """A thread that says what came of it, and clears up after MLX as each should."""

    def __init__(self, run: Callable[[], object]) -> None:
        super().__init__()
        self._run = run
        self._found: object = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Run it."""
        try:
            self._found = self._run()
        except BaseException as error:  # noqa: BLE001
            self._error = error
        finally:
            mx.clear_streams()

    def result(self) -> object:
        """Wait for the end, and return or raise what there is."""
        self.join(100)
        if self._error is not None:
            raise self._error
        return self._found


def test_threads_share_the_engine(engine: MLXEngine) -> None:
    """Each session in a thread of its own says what it says alone."""
    alone = [answer(engine, prompt, 10) for prompt in PROMPTS]
    threads = [Thread(partial(answer, engine, prompt, 10)) for prompt in PROMPTS]
    assert [thread.result() for thread in threads] == alone


def test_session_goes_from_thread_to_thread(engine: MLXEngine) -> None:
    """A step in one thread, the next in another: streams, which are a thread's own, don't show."""
    with Session() as session:
        engine.prefill(session, PROMPT)
        tokens = [Thread(lambda: engine.decode(session).token).result() for _ in range(6)]
        tokens += decode(engine, session, 4)
        assert tokens == answer(engine, PROMPT, 10)


@pytest.mark.parametrize("kind", LOSSY)
def test_checkpoints_go_from_thread_to_thread(kind: str) -> None:
    """Going back to a checkpoint leaves nothing to be computed on a stream of the thread that did so."""
    engine = MLXEngine(lossy_model(kind), chunk=16)

    def rewind() -> None:
        with engine.slots.borrow(session) as state:
            state.rewind(35)
            assert state.kv_length in (32, 34)

    with Session() as session:
        Thread(lambda: engine.prefill(session, PROMPT)).result()
        Thread(lambda: decode(engine, session, 5)).result()
        Thread(rewind).result()
        engine.prefill(session, OTHER)
        assert decode(engine, session, 5) == answer(engine, PROMPT[:35] + OTHER, 5)


@pytest.mark.parametrize("kind", LOSSY)
def test_files_and_branches_go_from_thread_to_thread(kind: str, tmp_path: Path) -> None:
    """Saved, restored and branched by three threads, a session is stepped by a fourth."""
    engine = MLXEngine(lossy_model(kind), chunk=16)

    def save() -> None:
        expected.extend(saved(engine, tmp_path / "session"))

    def restore() -> None:
        sessions.append(engine.slots.restore(tmp_path / "session"))

    def branch() -> None:
        with engine.slots.borrow(sessions[0]) as state:
            sessions.append(state.branch(45))

    expected: list[list[int]] = []
    sessions: list[Session] = []
    for run in save, restore, branch:
        Thread(run).result()
    with sessions[0], sessions[1]:
        tokens, rest = expected
        assert decode(engine, sessions[0], 10) == rest
        engine.prefill(sessions[1], OTHER)
        assert decode(engine, sessions[1], 5) == answer(engine, tokens[:45] + OTHER, 5)


def test_two_threads_at_one_session(engine: MLXEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second to step a session is refused at once: it doesn't wait for MLX."""
    evaluate = mx.eval
    inside, over = threading.Event(), threading.Event()

    def slow(*arrays: object) -> None:
        inside.set()
        assert over.wait(60)
        evaluate(*arrays)

    with Session() as session:
        engine.prefill(session, PROMPT)
        with monkeypatch.context() as patch:
            patch.setattr(mx, "eval", slow)
            thread = Thread(lambda: engine.decode(session).token)
            assert inside.wait(60)
            with pytest.raises(SessionBusyError):
                engine.decode(session)
            over.set()
            token = thread.result()
        assert [token] == answer(engine, PROMPT, 1)


EXIT = """
import threading
import mlx.core as mx
from inference_session import Session
from mlx_engine import MLXEngine, random_model

engine = MLXEngine(random_model(1))
sessions = [Session() for _ in range(3)]
for session in sessions:
    engine.prefill(session, range(20))

def step(session):
    engine.decode(session)
    mx.clear_streams()

threads = [threading.Thread(target=step, args=(session,)) for session in sessions]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(sum(session.token_count for session in sessions))
"""


def test_interpreter_exits() -> None:
    """An exit with sessions open, stepped by threads that ended as MLX wants it, is a quiet one."""
    run = subprocess.run(
        [sys.executable, "-c", EXIT],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=100,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "63\n", "")


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without MLX, the error says how to install it."""
    monkeypatch.setitem(sys.modules, "mlx_lm.models.cache", None)
    monkeypatch.delitem(sys.modules, "mlx_engine")
    with pytest.raises(ImportError, match=r"pip install 'mlx\[cpu\]==.*' mlx-lm=="):
        importlib.import_module("mlx_engine")
