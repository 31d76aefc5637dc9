"""The engine over transformers: real models, real caches, and faults in the middle of both."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import runpy
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from tests.engines.serving import OTHER, PROMPT, VOCAB_SIZE, Serving, decode, look
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    GPT2Config,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.cache_utils import DynamicLayer

import transformers_engine
from inference_session import Session
from inference_session.exceptions import SessionBusyError, SessionClosedError, StateMismatchError
from inference_session.testing import parametrize_with_checks
from transformers_engine import RAGGED, TransformersEngine, random_llama


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
    assert transformers_engine.length(cache) == RAGGED
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
    assert transformers_engine.length(cache) == RAGGED


@pytest.mark.parametrize("tokens", range(len(OTHER) + 1))
def test_truncated_cache_is_a_shorter_one(model: LlamaForCausalLM, tokens: int) -> None:
    """Every layer keeps just the first tokens: none of them, some, or all."""
    cache = transformers_engine.truncate(filled(model, OTHER), tokens)
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
    assert transformers_engine.length(transformers_engine.truncate(cache, 100)) == len(OTHER)
    new = DynamicCache(config=model.config)
    assert transformers_engine.length(transformers_engine.truncate(new, 0)) == 0


def test_truncation_evens_layers_out(model: LlamaForCausalLM) -> None:
    """What a step that failed half-way added to some layers is taken from just those."""
    cache = filled(model, PROMPT)
    for layer in layers(cache)[2:]:
        layer.crop(-3)
    transformers_engine.truncate(cache, len(PROMPT) - 3)
    assert transformers_engine.length(cache) == len(PROMPT) - 3


def test_nbytes_is_what_is_held(model: LlamaForCausalLM) -> None:
    """A budget counts the memory: of keys and values, of every layer, cropped or not."""
    cache = DynamicCache(config=model.config)
    assert transformers_engine.nbytes(cache) == 0
    cache = filled(model, PROMPT)
    per_token = 2 * NUM_LAYERS * 2 * 16 * 8  # 2 key-value heads of 16 float64 numbers.
    assert transformers_engine.nbytes(cache) == len(PROMPT) * per_token
    transformers_engine.truncate(cache, 10)
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


# What is refused


@pytest.mark.parametrize("tokens", [[1.0, 2.0], ["1"], [None], [[1, 2]], 3, [1, 2**70]])
@pytest.mark.parametrize("call", ["prefill", "prompt"])
def test_what_is_no_token_changes_nothing(
    engine: TransformersEngine, session: Session, call: str, tokens: object
) -> None:
    """Only ints of the vocabulary get as far as the history."""
    engine.prefill(session, PROMPT)
    before = look(engine, session)
    with pytest.raises((TypeError, ValueError), match=r"integer|iterable|vocabulary of 128"):
        getattr(engine, call)(session, tokens)
    assert look(engine, session) == before


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
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=128,
        n_embd=32,
        n_layer=3,
        n_head=4,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "gemma3": Gemma3TextConfig(
        **SIZES,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=8),
}


def new_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return a model with random weights, always the same."""
    torch.manual_seed(4)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model.double()


@pytest.mark.parametrize("name", CONFIGS)
def test_other_models(name: str, session: Session) -> None:
    """Learned positions, sliding windows: also what can't be truncated is right after a failure."""
    model = new_model(CONFIGS[name])
    engine = TransformersEngine(model, chunk=16)
    assert (engine.slots.truncate is None) == (name in {"gemma3", "mistral"})
    expected = plain(model, PROMPT, 20)
    assert len(set(expected)) > 4
    engine.prefill(session, PROMPT)
    assert decode(engine, session, 10) == expected[:10]

    for call in range(6):
        with failing_cat(call), pytest.raises(torch.OutOfMemoryError):
            engine.decode(session)
        assert session.token_count == len(PROMPT) + 10
    assert engine.generate(session, 10) == expected[10:]
    with engine.slots.borrow(session) as state:
        state.rewind(20)
    assert decode(engine, session, 10) == plain(model, PROMPT[:20], 10)


@SINCE_5
def test_model_whose_cache_has_no_length_is_refused() -> None:
    """A recurrent state can't tell what it covers, so a torn one could not be told from a whole."""
    config = MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"only attention .* LinearAttentionLayer"):
        TransformersEngine(new_model(config))


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
