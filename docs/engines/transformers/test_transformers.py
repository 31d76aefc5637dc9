"""The engine over transformers: real models, real caches, and faults in the middle of both."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import io
import runpy
import struct
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors
import torch
import transformers
from tests.saving import Saving, check_computed_anew, go_on_elsewhere, saved
from tests.serving import OTHER, PROMPT, VOCAB_SIZE, RefusingTokens, Serving, answer, decode, look
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    FalconH1Config,
    Gemma3TextConfig,
    GPT2Config,
    JambaConfig,
    Lfm2Config,
    LlamaForCausalLM,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    QuantizedCache,
    Qwen3Config,
    Qwen3NextConfig,
    RwkvConfig,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer

import transformers_engine
from inference_session import Session
from inference_session.engine import TORN
from inference_session.exceptions import SessionBusyError, SessionClosedError, StateMismatchError
from inference_session.testing import check_engine, parametrize_with_checks
from transformers_engine import CountedCache, TransformersEngine, random_llama


NUM_LAYERS = 4
CONTEXT_LENGTH = 512
torch.set_num_threads(1)

SINCE_5 = pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="transformers 4 does this otherwise"
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Give a small model; its weights never change."""
    return random_llama(1, vocab_size=VOCAB_SIZE)


@pytest.fixture
def engine(model: LlamaForCausalLM) -> TransformersEngine:
    """Give an engine whose chunks are short enough for a prompt to have several."""
    return TransformersEngine(model, chunk=16)


@pytest.fixture
def session() -> Iterator[Session]:
    """Give a session, and close it in the end."""
    with Session() as session:
        yield session


@torch.no_grad()
def plain_logits(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """Compute the logits after some tokens with neither session nor cache."""
    logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
    return logits


def plain(model: PreTrainedModel, prompt: Sequence[int], tokens: int) -> list[int]:
    """Continue a prompt with neither session nor cache: the whole text anew for each token."""
    text = list(prompt)
    while len(text) < len(prompt) + tokens:
        text.append(int(plain_logits(model, text).argmax()))
    return text[len(prompt) :]


def plain_generate(
    model: PreTrainedModel, prompt: Sequence[int], tokens: int, **options: object
) -> list[int]:
    """Continue a prompt as a user of transformers does."""
    ids = torch.tensor([prompt])
    generate = cast("Any", model).generate
    output = generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **options)
    return cast("list[int]", output[0, len(prompt) :].tolist())


def layers(cache: DynamicCache) -> list[DynamicLayer]:
    """Return the layers of a cache, as what they are."""
    return cast("list[DynamicLayer]", cache.layers)


def truncated(model: PreTrainedModel, cache: Cache, most: int) -> DynamicCache:
    """Return what an engine makes of a cache that is to cover so many tokens at most."""
    truncate = TransformersEngine(model).slots.truncate
    assert truncate is not None
    return cast("DynamicCache", truncate(cache, most))


def filled(model: PreTrainedModel, tokens: Sequence[int]) -> DynamicCache:
    """Return a cache that was fed some tokens, with no session."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens]), past_key_values=cache)
    return cache


# The conformance kit

CHECKED = random_llama(5, vocab_size=VOCAB_SIZE)


@parametrize_with_checks(lambda: TransformersEngine(CHECKED, chunk=4), vocab_size=VOCAB_SIZE)
def test_engine(check: Callable[[], None]) -> None:
    """The engine keeps a promise."""
    check()


# The model is worth testing with


def test_logits_depend_on_every_token(model: LlamaForCausalLM) -> None:
    """No token of the prompt can be lost unseen."""
    logits = plain_logits(model, PROMPT)
    for position, token in enumerate(PROMPT):
        other = [*PROMPT[:position], (token + 1) % VOCAB_SIZE, *PROMPT[position + 1 :]]
        assert (plain_logits(model, other) - logits).abs().max() > 0.05


def test_logits_depend_on_the_cache_of_every_layer(model: LlamaForCausalLM) -> None:
    """No layer's cache can be torn unseen."""
    for layer in range(NUM_LAYERS):
        cache = filled(model, PROMPT[:-1])
        for tensor in layers(cache)[layer].keys, layers(cache)[layer].values:
            assert tensor is not None
            tensor[:, :, 20] = 0
        with torch.no_grad():
            output = model(input_ids=torch.tensor([PROMPT[-1:]]), past_key_values=cache)
        assert (output.logits[0, -1] - plain_logits(model, PROMPT)).abs().max() > 0.02


# What a session says does not depend on how it is served


class TestServing(Serving):
    """What a session says does not depend on how it is served."""


# Prefill and decode


def test_tokens_are_those_of_the_model(engine: TransformersEngine, session: Session) -> None:
    """Prefill and decode together are greedy decoding of the model, and the history tells so."""
    added = engine.prefill(session, PROMPT).tokens_processed
    tokens = decode(engine, session, 20)
    assert (added, tokens) == (len(PROMPT), plain(engine.model, PROMPT, 20))
    assert look(engine, session) == (PROMPT + tokens, len(PROMPT + tokens) - 1)


def test_chunks_bound_what_is_fed_at_once(
    engine: TransformersEngine, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long prompt never needs the memory for all of its activations, nor for all logits."""
    fed: list[tuple[int, int]] = []

    def seen(_module: object, _args: object, options: dict[str, Any], output: Any) -> None:
        fed.append((options["input_ids"].shape[1], output.logits.shape[1]))

    with engine.model.register_forward_hook(seen, with_kwargs=True):
        engine.prefill(session, PROMPT)
        engine.decode(session)
    assert fed == [(16, 1), (16, 1), (7, 1), (1, 1)]


@pytest.mark.parametrize("pending", [0, 1, 5])
def test_rewind_is_a_fresh_session(
    engine: TransformersEngine, session: Session, pending: int
) -> None:
    """After a rewind the rest is forgotten, also where nothing was left to decode from."""
    engine.prefill(session, PROMPT)
    decode(engine, session, 5)
    with engine.slots.borrow(session) as state:
        state.rewind(20, pending=pending)
        assert state.kv_length == 20 - pending
    assert decode(engine, session, 10) == plain(engine.model, PROMPT[:20], 10)


# The KV cache


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
@pytest.mark.parametrize("name", ["keys", "values"])
def test_length_reads_every_layer(model: LlamaForCausalLM, layer: int, name: str) -> None:
    """A cache whose layers disagree has no length: neither the first layer's nor any other's."""
    cache = filled(model, PROMPT)
    assert transformers_engine.length(cache) == cache.get_seq_length() == len(PROMPT)
    tensor = getattr(cache.layers[layer], name)
    setattr(cache.layers[layer], name, tensor[:, :, :-3])
    assert transformers_engine.length(cache) == TORN
    if layer > 0:
        assert cache.get_seq_length() == len(PROMPT)  # What transformers says of it.


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_ragged_cache_is_noticed(engine: TransformersEngine, session: Session, layer: int) -> None:
    """A step that feeds some layers only is an error at once, and undone; such a cache isn't trusted again."""
    engine.prefill(session, PROMPT)

    def lose(_module: object, _args: object, options: dict[str, Any], _output: object) -> None:
        layers(options["past_key_values"])[layer].crop(-1)

    with (
        engine.model.register_forward_hook(lose, with_kwargs=True),
        pytest.raises(StateMismatchError),
    ):
        engine.decode(session)
    assert look(engine, session) == (PROMPT, 0)
    assert decode(engine, session, 10) == plain(engine.model, PROMPT, 10)


def test_cache_of_several_sequences_has_no_length(model: LlamaForCausalLM) -> None:
    """A cache that beam search widened is not a session's, however long it is."""
    cache = filled(model, PROMPT)
    cache.batch_repeat_interleave(3)
    assert transformers_engine.length(cache) == TORN


@pytest.mark.parametrize("tokens", range(len(OTHER) + 1))
def test_truncated_cache_is_a_shorter_one(model: LlamaForCausalLM, tokens: int) -> None:
    """Every layer keeps just the first tokens: none of them, some, or all."""
    cache = truncated(model, filled(model, OTHER), tokens)
    assert transformers_engine.length(cache) == tokens
    if tokens:
        for layer, expected in zip(
            layers(cache), layers(filled(model, OTHER[:tokens])), strict=True
        ):
            for tensor, wanted in (layer.keys, expected.keys), (layer.values, expected.values):
                assert tensor is not None
                assert wanted is not None
                torch.testing.assert_close(tensor, wanted)
    with torch.no_grad():
        rest = torch.tensor([[*OTHER[tokens:], *PROMPT]])
        logits = model(input_ids=rest, past_key_values=cache).logits[0, -1]
    torch.testing.assert_close(logits, plain_logits(model, OTHER + PROMPT))


def test_truncation_of_nothing(model: LlamaForCausalLM) -> None:
    """A cache that is as short already, or was never fed, stays as it is."""
    cache = filled(model, OTHER)
    assert truncated(model, cache, 100) is cache
    assert transformers_engine.length(cache) == len(OTHER)
    new = DynamicCache(config=model.config)
    assert transformers_engine.length(truncated(model, new, 0)) == 0


def test_truncation_evens_layers_out(model: LlamaForCausalLM) -> None:
    """What a step that failed half-way added to some layers is taken from just those."""
    cache = filled(model, PROMPT)
    for layer in layers(cache)[2:]:
        layer.crop(-3)
    assert truncated(model, cache, len(PROMPT) - 3) is cache
    assert transformers_engine.length(cache) == len(PROMPT) - 3


def test_nbytes_is_what_is_held(model: LlamaForCausalLM) -> None:
    """A budget counts the memory: of keys and values, of every layer, cropped or not."""
    cache = DynamicCache(config=model.config)
    assert transformers_engine.nbytes(cache) == 0
    cache = filled(model, PROMPT)
    per_token = 2 * NUM_LAYERS * 2 * 16 * 8  # 2 key-value heads of 16 float64 numbers.
    assert transformers_engine.nbytes(cache) == len(PROMPT) * per_token
    truncated(model, cache, 10)
    assert transformers_engine.nbytes(cache) == len(PROMPT) * per_token  # It is a view.
    with torch.no_grad():
        model(input_ids=torch.tensor([[1]]), past_key_values=cache)
    assert transformers_engine.nbytes(cache) == 11 * per_token


# Failure

Fault = type[BaseException]
FAULTS: list[Fault] = [MemoryError, torch.OutOfMemoryError, KeyboardInterrupt]


@contextmanager
def failing_cat(call: int) -> Generator[None]:
    """Let one call of `torch.cat`, by which caches grow, run out of memory."""
    cat, calls = torch.cat, count()

    def failing(*args: Any, **options: Any) -> torch.Tensor:
        if next(calls) == call:
            raise torch.OutOfMemoryError
        return cat(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cat", failing)
        yield


def steps(engine: TransformersEngine, session: Session) -> dict[str, Callable[[], object]]:
    """Return every call that goes through the model."""
    return {
        "prefill": lambda: engine.prefill(session, OTHER),
        "decode": lambda: engine.decode(session),
        "generate": lambda: engine.generate(session, 3),
    }


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("layer", range(NUM_LAYERS))
@pytest.mark.parametrize("call", ["prefill", "decode", "generate"])
def test_fault_between_layers_leaves_no_trace(
    engine: TransformersEngine, session: Session, call: str, layer: int, fault: Fault
) -> None:
    """A step that fails in mid-model leaves ragged layers; they are evened out, not recomputed."""
    engine.prefill(session, PROMPT)
    before = look(engine, session)
    passes = count()
    last = {"prefill": 1, "decode": 0, "generate": 2}[call]  # So that some passes went well.

    def fail(*_: object) -> None:
        if next(passes) == last:
            raise fault

    decoder = cast("LlamaForCausalLM", engine.model).model
    with decoder.layers[layer].register_forward_pre_hook(fail), pytest.raises(fault):
        steps(engine, session)[call]()
    assert look(engine, session) == before
    assert decode(engine, session, 10) == plain(engine.model, PROMPT, 10)


@pytest.mark.parametrize("call", ["prefill", "decode", "generate"])
def test_fault_in_mid_layer_leaves_no_trace(
    engine: TransformersEngine, session: Session, call: str
) -> None:
    """Caches grow by `torch.cat`, keys first: wherever memory runs out, the next step is right."""
    engine.prefill(session, PROMPT)
    before = look(engine, session)
    expected = plain(engine.model, PROMPT, 3)
    kept: list[bool] = []
    for call_that_fails in count():
        try:
            with failing_cat(call_that_fails):
                steps(engine, session)[call]()
        except torch.OutOfMemoryError:
            history, cached = look(engine, session)
        else:
            break  # It has no such call any more.
        assert history == before[0]
        kept.append(cached == before[1])
        assert decode(engine, session, 3) == expected
        with engine.slots.borrow(session) as state:
            state.rewind(len(PROMPT))
    passes = {"prefill": 2, "decode": 1, "generate": 3}[call]
    assert len(kept) >= passes * NUM_LAYERS * 2
    assert any(kept)  # Torn between keys and values, it may have to be computed anew.


def test_prefill_stops_when_the_session_is_closed(engine: TransformersEngine) -> None:
    """A client that goes away during a long prefill does not keep the engine busy to its end."""
    session = Session()
    passes = Counter[str]()

    def close(*_: object) -> None:
        passes["forward"] += 1
        session.close()

    with engine.model.register_forward_hook(close), pytest.raises(SessionClosedError):
        engine.prefill(session, PROMPT)
    assert passes["forward"] == 1


def test_fault_in_the_first_step_leaves_no_trace(
    engine: TransformersEngine, session: Session
) -> None:
    """With nothing to go back to, the session is as new."""
    decoder = cast("LlamaForCausalLM", engine.model).model

    def fail(*_: object) -> None:
        raise MemoryError

    with decoder.layers[2].register_forward_pre_hook(fail), pytest.raises(MemoryError):
        engine.prefill(session, PROMPT)
    assert session.token_count == 0
    engine.prefill(session, OTHER)
    assert decode(engine, session, 5) == plain(engine.model, OTHER, 5)


# Generate


@pytest.mark.parametrize("earlier", [0, 1, 7])
def test_generate_is_plain_generate(
    engine: TransformersEngine, session: Session, earlier: int
) -> None:
    """The same tokens as from `model.generate` with no session, from wherever it starts."""
    engine.prefill(session, PROMPT)
    tokens = decode(engine, session, earlier)
    tokens += engine.generate(session, 15)
    assert look(engine, session) == (PROMPT + tokens, len(PROMPT + tokens) - 1)
    tokens += engine.generate(session, 1)
    tokens += decode(engine, session, 4)
    assert tokens == plain_generate(engine.model, PROMPT, earlier + 20)
    assert tokens == plain(engine.model, PROMPT, earlier + 20)


@pytest.mark.parametrize("disturb", ["evict", "rewind", "reuse"])
def test_generate_catches_up(engine: TransformersEngine, session: Session, disturb: str) -> None:
    """Whatever the cache lacks is fed first."""
    engine.prefill(session, PROMPT)
    expected = plain_generate(engine.model, PROMPT, 10)
    decode(engine, session, 3)
    with engine.slots.borrow(session) as state:
        if disturb == "rewind":
            state.rewind(len(PROMPT), pending=0)
        else:
            state.reuse_prefix(PROMPT)
    if disturb == "evict":
        engine.slots.evict(session)
    assert engine.generate(session, 10) == expected


def test_generate_stops_where_plain_generate_does(
    engine: TransformersEngine, session: Session
) -> None:
    """A stop token ends it early, is in the history, and the conversation goes on."""
    expected = plain(engine.model, PROMPT, 12)
    stop = expected[5]
    end = expected.index(stop) + 1
    options: dict[str, object] = {"eos_token_id": stop, "pad_token_id": 0}
    engine.prefill(session, PROMPT)
    tokens = engine.generate(session, 12, **options)
    assert tokens == plain_generate(engine.model, PROMPT, 12, **options) == expected[:end]
    assert look(engine, session) == (PROMPT + tokens, len(PROMPT + tokens) - 1)
    assert decode(engine, session, 12 - end) == expected[end:]


def test_generate_samples_as_plain_generate(engine: TransformersEngine, session: Session) -> None:
    """Options reach `model.generate`: with the same seed it draws the same tokens."""
    engine.prefill(session, PROMPT)
    torch.manual_seed(3)
    tokens = engine.generate(session, 15, do_sample=True, temperature=0.8, top_p=0.9)
    torch.manual_seed(3)
    assert tokens == plain_generate(
        engine.model, PROMPT, 15, do_sample=True, temperature=0.8, top_p=0.9
    )
    assert decode(engine, session, 5) == plain(engine.model, PROMPT + tokens, 5)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"use_cache": False},
        {"return_dict_in_generate": True},
        pytest.param({"prompt_lookup_num_tokens": 3}, marks=SINCE_5),
    ],
    ids=["beams", "several", "uncached", "dict", "lookup"],
)
def test_generate_refuses_what_is_no_continuation(
    engine: TransformersEngine, session: Session, options: dict[str, object]
) -> None:
    """An option that makes of the cache something else than the session's is an error, undone."""
    engine.prefill(session, PROMPT)
    before = look(engine, session)
    with pytest.raises((RuntimeError, StateMismatchError, TypeError)):
        engine.generate(session, 5, **options)
    assert look(engine, session)[0] == before[0]
    assert decode(engine, session, 5) == plain(engine.model, PROMPT, 5)


# Files and branches


class TestSaving(Saving):
    """A session goes on the same in a file and in a branch."""


def test_restored_elsewhere(engine: TransformersEngine, tmp_path: Path) -> None:
    """A session goes on in another process, and needs nothing of this one."""
    tokens, expected = saved(engine, tmp_path / "session")
    code = f"""
from transformers_engine import TransformersEngine, random_llama
engine = TransformersEngine(random_llama(1, vocab_size={VOCAB_SIZE}))
"""
    assert go_on_elsewhere(code, tmp_path / "session") == [len(tokens) - 1, *expected]


@pytest.mark.parametrize("difference", ["weights", "number", "layers", "precision"])
def test_file_of_another_model(
    engine: TransformersEngine,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    difference: str,
) -> None:
    """A KV cache is taken only by the model it was computed with: the weights count, not its name."""
    saved(engine, tmp_path / "session")
    model: Any = random_llama(2 if difference == "weights" else 1, vocab_size=VOCAB_SIZE)
    if difference == "number":
        with torch.no_grad():
            model.model.layers[2].mlp.up_proj.weight += 0.01
    elif difference == "layers":
        del model.model.layers[3]
        model.config.num_hidden_layers = 3
    elif difference == "precision":
        model = model.float()
    other = TransformersEngine(model)
    check_computed_anew(other, tmp_path / "session", caplog, "load raised ValueError")


def test_model_on_several_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows which device a layer's part of a file belongs to, so only the tokens are saved."""
    model = random_llama(1, vocab_size=VOCAB_SIZE)
    spread = [torch.empty(1, device="meta"), *model.parameters()]
    monkeypatch.setattr(model, "parameters", lambda: iter(spread))
    engine = TransformersEngine(model)
    monkeypatch.undo()
    tokens, expected = saved(engine, tmp_path / "session")
    with engine.slots.restore(tmp_path / "session") as session:
        assert look(engine, session) == (tokens, 0)
        assert decode(engine, session, 10) == expected


@pytest.mark.parametrize("size", [0, 10, 16, 20, 100, 1000, -1])
def test_file_that_ends_early(engine: TransformersEngine, session: Session, size: int) -> None:
    """A file cut off anywhere is an error, never a cache with a part of the layers."""
    file = io.BytesIO()
    engine.prefill(session, PROMPT)
    with engine.slots.borrow(session) as state:
        engine._dump(state.kv_cache, file)
    with pytest.raises((ValueError, struct.error, safetensors.SafetensorError)):
        engine._load(io.BytesIO(file.getvalue()[:size]))


def test_file_is_written_layer_by_layer(engine: TransformersEngine, session: Session) -> None:
    """No part of a file is larger than a layer, so there's no second copy of all in memory."""

    class File(io.BytesIO):
        def write(self, data: Any, /) -> int:
            sizes.append(len(data))
            return super().write(data)

    sizes: list[int] = []
    engine.prefill(session, PROMPT * 10)
    with engine.slots.borrow(session) as state:
        engine._dump(state.kv_cache, File())
        assert max(sizes) < transformers_engine.nbytes(state.kv_cache) / NUM_LAYERS + 1000


def test_branches_share_tensors(engine: TransformersEngine, session: Session) -> None:
    """A branch takes no memory for keys and values, until it grows."""
    engine.prefill(session, PROMPT)
    with engine.slots.borrow(session) as state, state.branch(20) as child:
        parent = {tensor.data_ptr() for tensor in held(state.kv_cache)}
        with engine.slots.borrow(child) as other:
            assert {tensor.data_ptr() for tensor in held(other.kv_cache)} == parent
        engine.decode(child)
        with engine.slots.borrow(child) as other:
            assert parent.isdisjoint(tensor.data_ptr() for tensor in held(other.kv_cache))


def held(cache: transformers_engine.KV) -> Iterator[torch.Tensor]:
    """Return all keys and values of a cache without recurrent layers."""
    assert isinstance(cache, DynamicCache)
    return transformers_engine.tensors([vars(layer) for layer in layers(cache)])


# What is refused


class TestTokens(RefusingTokens):
    """Only ints of the vocabulary get as far as the history."""


def test_tokens_may_come_as_a_tensor(engine: TransformersEngine, session: Session) -> None:
    """A tokenizer returns tensors, and they are fine."""
    engine.prefill(session, cast("list[int]", torch.tensor(PROMPT)))
    assert decode(engine, session, 3) == plain(engine.model, PROMPT, 3)


def test_empty_session_is_refused(engine: TransformersEngine, session: Session) -> None:
    """There is nothing to decode from."""
    assert engine.prefill(session, []).tokens_processed == 0
    for step in (lambda: engine.decode(session), lambda: engine.generate(session, 3)):
        with pytest.raises(ValueError, match="session is empty"):
            step()
    assert session.token_count == 0


def test_context_is_as_long_as_it_is(engine: TransformersEngine, session: Session) -> None:
    """The last token of the context can be decoded, and not one more, by no call."""
    engine.prefill(session, [1] * (CONTEXT_LENGTH - 2))
    for step in (
        lambda: engine.generate(session, 3),
        lambda: engine.prefill(session, [1, 2, 3]),
    ):
        with pytest.raises(ValueError, match="513 tokens do not fit in a context of 512"):
            step()
    decode(engine, session, 2)
    with pytest.raises(ValueError, match="do not fit"):
        engine.decode(session)
    assert session.token_count == CONTEXT_LENGTH


def test_busy_session_is_refused(engine: TransformersEngine, session: Session) -> None:
    """No call steps a session that is being stepped."""
    engine.prefill(session, PROMPT)
    with engine.slots.borrow(session):
        for step in steps(engine, session).values():
            with pytest.raises(SessionBusyError):
                step()


# Other models

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_LENGTH,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MAMBA_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "state_size": 8,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ROPE_LIMIT = 40
PHI3_SIZES: dict[str, Any] = {
    **SIZES,
    "pad_token_id": 0,
    "original_max_position_embeddings": ROPE_LIMIT,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=CONTEXT_LENGTH,
        n_embd=32,
        n_layer=3,
        n_head=4,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=8),
    "long window": lambda: MistralConfig(**SIZES, sliding_window=64),
    "phi3": lambda: Phi3Config(**PHI3_SIZES),
    "qwen3 next": lambda: Qwen3NextConfig(
        **SIZES,
        head_dim=8,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=0,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "lfm2": lambda: Lfm2Config(**SIZES, layer_types=["conv", "full_attention", "conv"]),
    "falcon h1": lambda: FalconH1Config(  # Each layer is both.
        **SIZES,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
    ),
    "jamba": lambda: JambaConfig(
        **SIZES,
        num_experts=1,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "mamba": lambda: MambaConfig(**MAMBA_SIZES),
    "mamba2": lambda: Mamba2Config(
        **MAMBA_SIZES, head_dim=16, num_heads=4, n_groups=2, chunk_size=8
    ),
}
RECURRENT = ["qwen3 next", "lfm2", "falcon h1", "jamba", "mamba", "mamba2"]
FORGETFUL = ["jamba", "mamba"]
NO_ATTENTION = ["mamba", "mamba2"]
WRAPPED = ["gemma3", "mistral"]

EACH = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=SINCE_5 if name in RECURRENT else ()) for name in CONFIGS],
)


def recurrent(*names: str) -> pytest.MarkDecorator:
    """Try models that only transformers 5 keeps the states of in its cache."""
    return pytest.mark.parametrize("name", [pytest.param(name, marks=SINCE_5) for name in names])


@cache
def new_model(name: str) -> PreTrainedModel:
    """Return a model with random weights, always the same."""
    torch.manual_seed(4)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name]())  # type: ignore[no-untyped-call]
    return model.double()


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the layers, whatever a model calls them."""
    count = model.config.get_text_config().num_hidden_layers
    stacks = [part for part in model.modules() if isinstance(part, torch.nn.ModuleList)]
    return next(list(stack) for stack in stacks if len(stack) == count)


@contextmanager
def fed(model: PreTrainedModel) -> Generator[list[int]]:
    """Note how many tokens go through a model at once."""
    sizes: list[int] = []

    def note(_module: object, _args: object, options: dict[str, Any]) -> None:
        sizes.append(options["input_ids"].shape[1])

    with model.register_forward_pre_hook(note, with_kwargs=True):
        yield sizes


def fail(*_: object) -> None:
    """Do what a hook does that strikes."""
    raise MemoryError


@EACH
def test_other_models(name: str, session: Session) -> None:
    """Learned positions, windows, recurrent states: as the model says, also after a failure."""
    model = new_model(name)
    engine = TransformersEngine(model, chunk=16)
    expected = plain(model, PROMPT, 20)
    assert len(set(expected)) > 4
    engine.prefill(session, PROMPT)
    assert decode(engine, session, 10) == expected[:10]

    for call in range(6):
        with failing_cat(call), suppress(torch.OutOfMemoryError):
            engine.decode(session)
    done = session.token_count - len(PROMPT)
    assert done == 10 or name in RECURRENT  # Recurrent states don't grow.
    assert decode(engine, session, 20 - done) == expected[done:]
    with engine.borrow(session) as state:
        state.rewind(20)
    assert decode(engine, session, 10) == plain(model, PROMPT[:20], 10)


@EACH
@pytest.mark.parametrize("call", ["prefill", "decode"])
def test_fault_between_layers_of_other_models(call: str, name: str, session: Session) -> None:
    """Before or after any layer: a state that is ahead of the others does not show."""
    model = new_model(name)
    engine = TransformersEngine(model, chunk=16)
    expected = plain(model, PROMPT[:30], 5)
    for layer in decoder_layers(model):
        for register in layer.register_forward_pre_hook, layer.register_forward_hook:
            with engine.borrow(session) as state:
                state.rewind(0)
            engine.prefill(session, PROMPT[:30])
            decode(engine, session, 2)  # So that there is no checkpoint just here.
            with register(fail), pytest.raises(MemoryError):
                steps(engine, session)[call]()
            assert look(engine, session)[0] == PROMPT[:30] + expected[:2]
            assert decode(engine, session, 3) == expected[2:]


@EACH
def test_how_it_is_served_does_not_show(name: str, session: Session) -> None:
    """Evicted, rewound, fully covered, given another prompt: as a fresh session each time."""
    model = new_model(name)
    engine = TransformersEngine(model, chunk=16)
    for tokens in PROMPT, OTHER, OTHER + PROMPT, OTHER + PROMPT[:9], [*OTHER, 1]:
        engine.prompt(session, tokens)
        first = engine.decode(session).token
        engine.slots.evict(session)
        assert [first, *decode(engine, session, 2)] == plain(model, tokens, 3)
    for kept in 15, 6, 1:
        with engine.borrow(session) as state:
            state.rewind(kept, pending=0)  # Fully covered, if it can be cut there.
        assert decode(engine, session, 2) == plain(model, OTHER[:kept], 2)
    engine.prefill(session, PROMPT[:30])
    assert decode(engine, session, 2) == plain(model, [*look(engine, session)[0]][:-2], 2)


@EACH
def test_generate_of_other_models(name: str, session: Session) -> None:
    """Whatever the model keeps, `generate` goes on from it, or says that it can't."""
    model = new_model(name)
    engine = TransformersEngine(model, chunk=16)
    engine.prefill(session, PROMPT[:20])
    tokens = decode(engine, session, 2)
    if name in NO_ATTENTION:
        with pytest.raises(ValueError, match="needs attention layers"):
            engine.generate(session, 10)
        return
    expected = plain(model, PROMPT[:20], 20)
    tokens += engine.generate(session, 6)
    stop = expected[11]
    tokens += engine.generate(session, 10, eos_token_id=stop, pad_token_id=0)
    assert tokens[-1] == stop
    assert look(engine, session) == (PROMPT[:20] + tokens, 20 + len(tokens) - 1)
    tokens += decode(engine, session, 20 - len(tokens))
    assert tokens == expected


@recurrent("lfm2", "jamba")
def test_generate_of_several_is_refused(name: str, session: Session) -> None:
    """Beams widen the states, too, and are noticed."""
    model = new_model(name)
    engine = TransformersEngine(model)
    engine.prefill(session, PROMPT)
    with pytest.raises((RuntimeError, StateMismatchError, ValueError)):
        engine.generate(session, 5, num_beams=3)
    assert decode(engine, session, 3) == plain(model, PROMPT, 3)


@SINCE_5
@pytest.mark.parametrize("name", ["long window", "lfm2"])
def test_assisted_generate_of_other_models_is_refused(name: str, session: Session) -> None:
    """It feeds what the cache has already, and has its layers keep more; both are undone."""
    engine = TransformersEngine(new_model(name))
    engine.prefill(session, PROMPT)
    with pytest.raises((RuntimeError, StateMismatchError)):
        engine.generate(session, 5, prompt_lookup_num_tokens=3)
    assert look(engine, session) == (PROMPT, 0)
    assert decode(engine, session, 3) == plain(engine.model, PROMPT, 3)


@pytest.mark.parametrize("name", ["lfm2", "mamba", "mistral", "phi3"])
def test_kit_with_other_models(name: str) -> None:
    """The engine keeps its promises whatever the model's cache is made of."""
    if name in RECURRENT and transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 keeps their states elsewhere")
    model = new_model(name)
    check_engine(lambda: TransformersEngine(model, chunk=4), vocab_size=VOCAB_SIZE, max_examples=1)


# phi3 has keys for its caches, which are not known to the tests in common.
class TestSavingOthers(Saving):
    """A session goes on the same in a file and in a branch, whatever its layers are."""

    @pytest.fixture(
        params=[
            pytest.param(name, marks=SINCE_5 if name in RECURRENT else ())
            for name in CONFIGS
            if name != "phi3"
        ]
    )
    def engine(self, request: pytest.FixtureRequest) -> TransformersEngine:
        """Give an engine of another model."""
        return TransformersEngine(new_model(request.param), chunk=16)

    def check_shared(self, covered: int, most: int) -> None:
        """Require that a cache that can't be cut is shared as a whole, at least."""
        assert covered == most if most == 45 else covered <= most


def test_files_and_branches_of_longrope(tmp_path: Path) -> None:
    """The key goes with a cache, so that one of a long text is used for a long text only."""
    engine = TransformersEngine(new_model("phi3"), chunk=16)
    tokens, expected = saved(engine, tmp_path / "session")
    assert len(tokens) > ROPE_LIMIT
    with engine.slots.restore(tmp_path / "session") as session, fed(engine.model) as sizes:
        assert decode(engine, session, 10) == expected
        assert sizes == [1] * 10
        with engine.borrow(session) as state:
            long, short = state.branch(ROPE_LIMIT + 2), state.branch(ROPE_LIMIT)
        with long, short:
            found = decode(engine, long, 1), decode(engine, short, 1)
        assert sizes[10:] == [1, 16, 16, 7, 1]  # Only the long one has a cache to go on from.
    for tokens_found, length in zip(found, (ROPE_LIMIT + 2, ROPE_LIMIT), strict=True):
        assert tokens_found == plain(engine.model, tokens[:length], 1)


@recurrent("lfm2", "mamba2")
def test_checkpoints_are_saved_and_shared(name: str, session: Session, tmp_path: Path) -> None:
    """Sessions from a file or a branch go back as far as the one they are from."""
    engine = TransformersEngine(new_model(name), chunk=16)
    engine.prefill(session, PROMPT)
    decode(engine, session, 5)
    engine.slots.save(session, tmp_path / "session")
    with engine.slots.borrow(session) as state:
        child = state.branch()
    with child, engine.slots.restore(tmp_path / "session") as restored:
        for other in child, restored:
            assert [*counted(engine, other).checkpoints] == [16, 32, 39]
            with engine.slots.borrow(other) as state:
                state.rewind(36)
                assert state.kv_length == 32
            assert decode(engine, other, 5) == plain(engine.model, PROMPT[:36], 5)


# Sliding windows


@pytest.mark.parametrize("name", ["mistral", "gemma3", "long window"])
def test_window_is_cut_until_it_is_full(name: str, session: Session) -> None:
    """What has slid out of a window is gone, so the cache is empty then; else it is kept."""
    engine = TransformersEngine(new_model(name), chunk=16)
    window = 64 if name == "long window" else 8
    for covered, kept in [(window - 2, window - 4), (window - 1, 2), (window, 2), (window + 3, 1)]:
        engine.prompt(session, [*range(covered), 0])
        with engine.slots.borrow(session) as state:
            assert state.kv_length == covered
            state.rewind(kept, pending=0)
            assert state.kv_length == (kept if covered < window else 0)
        assert decode(engine, session, 2) == plain(engine.model, range(kept), 2)


@pytest.mark.parametrize(
    ("name", "layer", "kept"), [("long window", 2, 39), ("mistral", 2, 0), ("mistral", 0, 39)]
)
def test_failed_step_keeps_what_no_window_lost(
    name: str, layer: int, kept: int, session: Session
) -> None:
    """A step that fails costs nothing but itself, as long as nothing slid out, or was touched."""
    engine = TransformersEngine(new_model(name))
    engine.prefill(session, PROMPT)
    failing = decoder_layers(engine.model)[layer]
    with failing.register_forward_pre_hook(fail), pytest.raises(MemoryError):
        engine.decode(session)
    assert look(engine, session) == (PROMPT, kept)


# Recurrent and hybrid models

LONG: list[int] = [(7 * i * i + i) % VOCAB_SIZE for i in range(240)]


def counted(engine: TransformersEngine, session: Session) -> CountedCache:
    """Return the cache of a session, outside a borrow."""
    with engine.slots.borrow(session) as state:
        assert isinstance(state.kv_cache, CountedCache)
        return state.kv_cache


@recurrent("qwen3 next", "lfm2", "falcon h1", "mamba2")
def test_next_turn_goes_on_from_a_checkpoint(name: str, session: Session) -> None:
    """Another answer to a prompt feeds none of it again; the cache of the answer is given up."""
    engine = TransformersEngine(new_model(name))
    engine.prefill(session, LONG)
    decode(engine, session, 36)
    turn = [*LONG, *OTHER[:5]]
    with fed(engine.model) as sizes:
        assert engine.prompt(session, turn) == 239  # Of 275.
    assert sizes == [5]
    assert decode(engine, session, 2) == plain(engine.model, turn, 2)
    engine.prompt(session, turn[:-1])
    decode(engine, session, 70)
    with engine.slots.borrow(session) as state:
        state.rewind(len(turn) + 60)
        assert state.kv_length == 243 + 32  # Every 32 tokens there is another.


@recurrent("qwen3 next", "lfm2", "falcon h1", "mamba2")
def test_speculation_feeds_few_tokens(name: str, session: Session) -> None:
    """A rejected guess costs the tokens since the checkpoint before it, not all of the text."""
    engine = TransformersEngine(new_model(name))
    engine.prefill(session, LONG[:200])
    expected = plain(engine.model, LONG[:200], 34)
    tokens: list[int] = []
    with fed(engine.model) as sizes:
        while len(tokens) < 30:
            # Two are guessed right, and two wrong.
            guess = expected[len(tokens) : len(tokens) + 2] + [expected[len(tokens)] ^ 1] * 2
            with engine.borrow(session, len(guess)) as state:
                engine.feed_all_but_last(state)  # What was guessed right, from the checkpoint.
                length = len(state.token_history)
                state.append(guess)
                logits = engine.feed(state, state.pending, logits=len(guess) + 1)
                likeliest = logits.argmax(-1).tolist()
                right = next(i for i, token in enumerate([*guess, -1]) if token != likeliest[i])
                state.rewind(length + right, pending=0)
                state.append(likeliest[right : right + 1])
            tokens += likeliest[: right + 1]
    assert tokens == expected[: len(tokens)]
    assert sum(sizes) <= 3 * len(tokens)


@recurrent("lfm2")
def test_checkpoints_are_few(name: str, session: Session) -> None:
    """However long a text is, a session keeps so many copies, dense near its end; or none."""
    model = new_model(name)
    engine = TransformersEngine(model, chunk=4, checkpoints=4)
    engine.prefill(session, LONG)
    kept = [*counted(engine, session).checkpoints]
    assert len(kept) == 4
    assert kept[-1] == 236
    gaps = [after - before for before, after in zip([0, *kept], kept, strict=False)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 16

    bare = TransformersEngine(model, chunk=4, checkpoints=0)
    with Session() as other:
        bare.prefill(other, LONG)
        assert not counted(bare, other).checkpoints
        assert bare.slots.nbytes is not None
        assert engine.slots.nbytes is not None
        without = bare.slots.nbytes(counted(bare, other))
        with_ = engine.slots.nbytes(counted(engine, session))
    states = 2 * 32 * 3 * 8  # Two layers of conv states, over three tokens.
    assert with_ - without == 4 * states


@recurrent("lfm2", "mamba2")
def test_torn_cache_goes_back_to_a_checkpoint(name: str, session: Session) -> None:
    """A count is none while the model runs; a failure costs what came since the checkpoint."""
    engine = TransformersEngine(new_model(name), chunk=16)
    engine.prefill(session, PROMPT)
    decode(engine, session, 3)
    torn: list[int] = []

    def look_and_fail(*_: object) -> None:
        torn.append(transformers_engine.length(state.kv_cache))
        raise MemoryError

    layer = decoder_layers(engine.model)[-1]
    with (
        layer.register_forward_hook(look_and_fail),
        pytest.raises(MemoryError),
        engine.borrow(session) as state,
    ):
        engine.feed(state, state.pending)
    assert torn == [TORN]
    assert look(engine, session)[1] == len(PROMPT) - 1


@recurrent(*FORGETFUL)
def test_forgetful_models_get_token_by_token(name: str, session: Session) -> None:
    """Fed in parts, they answer wrongly, and no error says so: the reason for what is done."""
    model = new_model(name)
    engine = TransformersEngine(model, chunk=16)
    argument = "cache_params" if name == "mamba" else "past_key_values"
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        wrong = [
            model(input_ids=torch.tensor([part]), use_cache=True, **{argument: cache}).logits[0, -1]
            for part in (PROMPT[:20], PROMPT[20:])
        ][-1]
    assert (wrong - plain_logits(model, PROMPT)).abs().max() > 0.05

    with fed(model) as sizes:
        engine.prefill(session, PROMPT)
        engine.prefill(session, OTHER[:3])
        assert sizes == [39, 1, 1, 1]
        with engine.borrow(session, 4) as state:
            state.append(PROMPT[:4])
            after = engine.feed(state, state.pending, logits=3)
        assert sizes[4:] == [1] * 5
    for row, kept in zip(after, (-2, -1, None), strict=True):
        expected = plain_logits(model, [*PROMPT, *OTHER[:3], *PROMPT[:4]][:kept])
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)


def test_model_whose_state_is_elsewhere_is_refused() -> None:
    """What is not in the cache can't be taken back, so no such model is served."""
    config = RwkvConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match="rwkv models keep a state where it can't be counted"):
        TransformersEngine(model)


@pytest.mark.skipif(
    not transformers.__version__.startswith("4."), reason="transformers 5 counts layers of all"
)
@pytest.mark.parametrize("name", ["lfm2", "mamba"])
def test_recurrent_models_are_refused_before_version_5(name: str) -> None:
    """Their states had classes of their own."""
    with pytest.raises(ValueError, match="transformers 5"):
        TransformersEngine(new_model(name))


# LongRoPE


@pytest.mark.parametrize("count", range(ROPE_LIMIT - 3, ROPE_LIMIT + 5))
@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_longrope_is_right_across_its_limit(count: int, chunk: int, session: Session) -> None:
    """No key that was rotated for a short text is used in a long one, wherever it begins."""
    model = new_model("phi3")
    engine = TransformersEngine(model, chunk=chunk)
    tokens = (PROMPT + OTHER)[:count]
    expected = plain(model, tokens, 8)
    engine.prefill(session, tokens)
    assert decode(engine, session, 8) == expected
    engine.prompt(session, tokens)
    assert decode(engine, session, 8) == expected
    engine.prefill(session, tokens[:3])
    engine.prefill(session, tokens[3:])
    turn = [*tokens, *expected, *tokens]
    assert decode(engine, session, 2) == plain(model, turn, 2)
    assert engine.prompt(session, turn[:-3]) == len(turn) - 4  # Of the same key.
    assert engine.prompt(session, [*turn[:20], *turn]) == 20
    assert decode(engine, session, 2) == plain(model, [*turn[:20], *turn], 2)


def test_longrope_matters() -> None:
    """A text of one token more is another, to its first token."""
    model = new_model("phi3")
    with torch.no_grad():
        ids = torch.tensor([(PROMPT + OTHER)[: ROPE_LIMIT + 1]])
        longer = model(input_ids=ids, use_cache=False).logits[0, ROPE_LIMIT - 1]
    assert (longer - plain_logits(model, (PROMPT + OTHER)[:ROPE_LIMIT])).abs().max() > 0.5


def test_longrope_feeds_as_little_together_as_it_must(session: Session) -> None:
    """A prompt beyond the limit goes in one part up to there, and on in chunks."""
    engine = TransformersEngine(new_model("phi3"), chunk=16)
    with fed(engine.model) as sizes:
        engine.prefill(session, LONG[: ROPE_LIMIT + 25])
        assert sizes == [ROPE_LIMIT + 1, 16, 7]
        engine.prompt(session, LONG[: ROPE_LIMIT + 1])
        assert sizes == [ROPE_LIMIT + 1, 16, 7]  # Its last token has to be fed with it.
        engine.decode(session)
        assert sizes[3:] == [1]  # All others were computed for a long text.
        engine.slots.evict(session)
        engine.prompt(session, LONG[: ROPE_LIMIT + 1])
        engine.decode(session)
        assert sizes[4:] == [ROPE_LIMIT + 1]
        engine.prompt(session, LONG[:ROPE_LIMIT])
        engine.decode(session)
        assert sizes[5:] == [16, 16, 7, 1]


@pytest.mark.parametrize("count", range(ROPE_LIMIT - 5, ROPE_LIMIT + 4))
def test_generate_stays_on_one_side_of_the_limit(count: int, session: Session) -> None:
    """`model.generate` leaves the session's cache at the limit: up to it, beyond it, or an error."""
    model = new_model("phi3")
    engine = TransformersEngine(model, chunk=16)
    tokens = (PROMPT + OTHER)[:count]
    engine.prefill(session, tokens)
    if count <= ROPE_LIMIT + 1:
        with pytest.raises(ValueError, match=f"decode from {count} to {ROPE_LIMIT + 2}"):
            engine.generate(session, 8)
    expected = plain(model, tokens, 12)
    short = max(ROPE_LIMIT + 1 - count, 0)
    new = engine.generate(session, short) if short else []
    new += decode(engine, session, max(ROPE_LIMIT + 2 - count - short, 0))
    new += engine.generate(session, 12 - len(new))
    assert new == expected


def test_longrope_decides_on_the_history_that_it_borrows(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another call that comes between the decision and the borrow does not make it wrong."""
    engine = TransformersEngine(new_model("phi3"), chunk=16)
    engine.prefill(session, PROMPT)
    monkeypatch.setattr(Session, "token_count", property(lambda _: len(PROMPT) - 9))
    key, calls = engine._key, count()

    def late(tokens: int) -> str:
        if next(calls) == 1:  # The history is looked at: now the count is what it is.
            monkeypatch.undo()
        return key(tokens)

    monkeypatch.setattr(engine, "_key", late)
    engine.prefill(session, OTHER[:9])
    assert decode(engine, session, 3) == plain(engine.model, PROMPT + OTHER[:9], 3)


# Other caches


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma3"])
def test_static_cache(name: str, session: Session) -> None:
    """A cache of a fixed size is served as any other, as far as it goes."""
    model = new_model(name)
    engine = TransformersEngine(
        model, chunk=16, cache=lambda: StaticCache(config=model.config, max_cache_len=80)
    )
    expected = plain(model, PROMPT, 20)
    engine.prefill(session, PROMPT)
    assert decode(engine, session, 10) == expected[:10]
    with decoder_layers(model)[1].register_forward_hook(fail), pytest.raises(MemoryError):
        engine.decode(session)
    assert decode(engine, session, 5) == expected[10:15]
    assert engine.generate(session, 5) == expected[15:]
    with engine.slots.borrow(session) as state:
        state.rewind(20)
    engine.prefill(session, OTHER)
    assert decode(engine, session, 5) == plain(model, PROMPT[:20] + OTHER, 5)
    if name != "mistral":  # Whose layers all slide.
        with pytest.raises(ValueError, match="do not fit in a context of 80"):
            engine.prefill(session, PROMPT)


@SINCE_5
def test_static_cache_is_cut_in_place(session: Session) -> None:
    """It keeps its memory, and what it covers, over a failed step and a rewind."""
    model = new_model("qwen3")
    engine = TransformersEngine(
        model, cache=lambda: StaticCache(config=model.config, max_cache_len=80)
    )
    engine.prefill(session, PROMPT)
    with decoder_layers(model)[1].register_forward_hook(fail), pytest.raises(MemoryError):
        engine.decode(session)
    assert look(engine, session) == (PROMPT, 39)
    with engine.slots.borrow(session) as state:
        kept = state.kv_cache
        state.rewind(20)
        assert state.kv_length == 19
        assert state.kv_cache is kept
    assert decode(engine, session, 5) == plain(model, PROMPT[:20], 5)


@SINCE_5
def test_static_cache_of_a_hybrid_model(session: Session) -> None:
    """Its attention has a fixed size, and its states have checkpoints all the same."""
    model = new_model("lfm2")
    engine = TransformersEngine(
        model, cache=lambda: StaticCache(config=model.config, max_cache_len=300)
    )
    engine.prefill(session, LONG)
    decode(engine, session, 20)
    assert engine.prompt(session, [*LONG, *OTHER]) == 239
    assert decode(engine, session, 3) == plain(model, LONG + OTHER, 3)


def test_other_caches_are_not_saved_but_shared(tmp_path: Path) -> None:
    """From a file, they are computed anew, with nothing to warn of; a branch has a copy."""
    model = new_model("qwen3")
    engine = TransformersEngine(
        model, cache=lambda: StaticCache(config=model.config, max_cache_len=80)
    )
    tokens, expected = saved(engine, tmp_path / "session")
    with engine.slots.restore(tmp_path / "session") as session:
        assert look(engine, session) == (tokens, 0)
        assert decode(engine, session, 10) == expected
        with engine.slots.borrow(session) as state:
            child = state.branch()
        with child:
            assert look(engine, child)[1] == len(tokens) + 9
            engine.prefill(child, [1])
            assert decode(engine, child, 5) == plain(model, [*tokens, *expected, 1], 5)
        assert decode(engine, session, 5) == answer(engine, tokens, 15)[10:]


@SINCE_5
def test_quantized_cache(session: Session) -> None:
    """It says what it covers, and is computed anew where it would have to be cut."""
    model = new_model("qwen3")

    def new_cache() -> Cache:
        return QuantizedCache("fp8", config=model.config)

    engine = TransformersEngine(model, chunk=16, cache=new_cache)
    bare, text = new_cache(), list(PROMPT)
    with torch.no_grad():  # Fed in the same parts, it is rounded in the same way.
        for part in PROMPT[:16], PROMPT[16:32], PROMPT[32:39]:
            model(input_ids=torch.tensor([part]), past_key_values=bare)
        for _ in range(8):
            ids = torch.tensor([text[-1:]])
            text.append(int(model(input_ids=ids, past_key_values=bare).logits[0, -1].argmax()))
    engine.prefill(session, PROMPT)
    assert decode(engine, session, 8) == text[len(PROMPT) :]
    assert look(engine, session) == (text, len(text) - 1)
    with engine.slots.borrow(session) as state:
        state.rewind(len(PROMPT))
        assert state.kv_length == 0
    assert decode(engine, session, 8) == text[len(PROMPT) :]


# Installation


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_missing_library_says_how_to_install_it(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever runs the engine without its libraries learns what to do."""
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=f"no {missing}: .*pip install torch==") as error:
        runpy.run_path(str(Path(transformers_engine.__file__)))
    assert error.value.name == missing
