"""The NumPy Llama: its arithmetic, and that how a session is served never shows in its tokens."""

from __future__ import annotations

import gc
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.batching import Batching
from tests.serving import OTHER, PROMPT, PROMPTS, VOCAB_SIZE, Serving, answer, decode, look

from inference_session import Session
from inference_session.exceptions import SessionBusyError, SessionClosedError
from llama_model import Batch, Floats, Llama, random_model
from numpy_llama import LlamaEngine, greedy, sampling


NUM_LAYERS = 3
CONTEXT_LENGTH = 200


@pytest.fixture(scope="module")
def model() -> Llama:
    """Give a small model; its weights never change."""
    return random_model(
        1, vocab_size=VOCAB_SIZE, num_layers=NUM_LAYERS, context_length=CONTEXT_LENGTH
    )


@pytest.fixture
def engine(model: Llama) -> Iterator[LlamaEngine]:
    """Give an engine, and check in the end that all of its KV caches were released."""
    engine = LlamaEngine(model, chunk=16)
    yield engine
    gc.collect()
    assert engine.memory.created == engine.memory.released > 0
    assert engine.memory.used == 0
    assert not engine.memory._caches


# The arithmetic


def naive_logits(model: Llama, tokens: Sequence[int]) -> Floats:
    """Compute the logits after `tokens` as a textbook has it: no cache, no batch, head by head."""
    config = model.config
    dim = config.head_dim

    def norm(x: NDArray[np.float64], weight: Floats) -> NDArray[np.float64]:
        mean_squares = [sum(number * number for number in row) / len(row) for row in x.tolist()]
        roots = np.sqrt(np.array(mean_squares) + config.norm_epsilon)
        return x / roots[:, np.newaxis] * weight.astype(np.float64)

    def rotate(vector: NDArray[np.float64], position: int) -> NDArray[np.float64]:
        turned = vector.copy()
        for pair in range(dim // 2):
            angle = position / config.rope_theta ** (2 * pair / dim)
            turn = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
            turned[2 * pair : 2 * pair + 2] = turn @ vector[2 * pair : 2 * pair + 2]
        return turned

    x = model.embedding[list(tokens)].astype(np.float64)
    for layer in model.layers:
        queries, keys, values = np.split(
            norm(x, layer.attention_norm) @ layer.query_key_value,
            [config.num_heads * dim, (config.num_heads + config.num_kv_heads) * dim],
            axis=1,
        )
        attended = np.zeros((len(x), config.num_heads * dim))
        for head in range(config.num_heads):
            own = slice(head * dim, (head + 1) * dim)
            group = head // (config.num_heads // config.num_kv_heads)
            shared = slice(group * dim, (group + 1) * dim)
            for now in range(len(x)):
                query = rotate(queries[now, own], now)
                seen = [query @ rotate(keys[t, shared], t) / np.sqrt(dim) for t in range(now + 1)]
                weights = np.exp(seen) / np.sum(np.exp(seen))
                attended[now, own] = weights @ values[: now + 1, shared]
        x = x + attended @ layer.attention_output
        gate, up = np.split(norm(x, layer.feed_forward_norm) @ layer.gate_up, 2, axis=1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer.down
    logits: Floats = (norm(x[-1:], model.output_norm) @ model.output)[0].astype(np.float32)
    return logits


def logits_after(model: Llama, *chunks: Sequence[int]) -> Floats:
    """Return the logits that the model has after tokens that it is fed in these chunks."""
    engine = LlamaEngine(model)
    cache = engine.memory.create()
    hidden = [model.forward([(cache, np.array(chunk, np.int32))]) for chunk in chunks][-1]
    logits: Floats = model.logits(hidden)[0]
    return logits


def test_logits_are_those_of_the_textbook(model: Llama) -> None:
    """The fused, cached and batched arithmetic computes what Llama is defined to be."""
    assert logits_after(model, PROMPT) == pytest.approx(naive_logits(model, PROMPT), abs=1e-3)


def test_logits_depend_on_every_token(model: Llama) -> None:
    """The random model is worth testing with: no token of the prompt can be lost unseen."""
    logits = logits_after(model, PROMPT)
    for position, token in enumerate(PROMPT):
        other = [*PROMPT[:position], (token + 1) % VOCAB_SIZE, *PROMPT[position + 1 :]]
        assert np.abs(logits_after(model, other) - logits).max() > 0.1


def test_logits_depend_on_the_cache_of_every_layer(model: Llama) -> None:
    """The random model is worth testing with: no layer's cache can be torn unseen."""
    memory = LlamaEngine(model).memory
    next_token = np.array([PROMPT[-1]], np.int32)
    for layer in range(NUM_LAYERS):
        cache = memory.create()
        model.forward([(cache, np.array(PROMPT[:-1], np.int32))])
        cache.layers[layer][:, :, 20] = 0
        logits = model.logits(model.forward([(cache, next_token)]))[0]
        assert np.abs(logits - logits_after(model, PROMPT)).max() > 0.02


def test_one_pass_serves_sequences_of_any_length(model: Llama) -> None:
    """A batch of ragged sequences, cached to different lengths, is computed as each alone."""
    memory = LlamaEngine(model).memory
    caches = [memory.create() for _ in PROMPTS]
    model.forward([(caches[3], np.array(PROMPTS[3][:30], np.int32))])
    rest = [*PROMPTS[:3], PROMPTS[3][30:]]
    hidden = model.forward(
        [(cache, np.array(tokens, np.int32)) for cache, tokens in zip(caches, rest, strict=True)]
    )
    for logits, prompt in zip(model.logits(hidden), PROMPTS, strict=True):
        assert logits == pytest.approx(logits_after(model, prompt), abs=1e-3)


# The engine


class TestServing(Serving):
    """What a session says does not depend on how it is served."""


def test_tokens_are_those_of_the_textbook(engine: LlamaEngine) -> None:
    """Prefill and decode together are greedy decoding of the model, and the history tells so."""
    with Session() as session:
        added = engine.prefill(session, PROMPT).tokens_processed
        tokens = decode(engine, session, 8)
        assert look(engine, session) == (PROMPT + tokens, len(PROMPT + tokens) - 1)
    expected: list[int] = []
    for _ in range(8):
        expected.append(int(naive_logits(engine.model, PROMPT + expected).argmax()))
    assert (added, tokens) == (len(PROMPT), expected)


def test_prefill_of_nothing(engine: LlamaEngine) -> None:
    """An empty prefill is no error and no change, and makes an empty session no less empty."""
    with Session() as session:
        assert engine.prefill(session, []).tokens_processed == 0
        assert session.token_count == 0
        engine.prefill(session, PROMPT)
        engine.prefill(session, ())
        assert decode(engine, session, 5) == answer(engine, PROMPT, 5)


class TestBatching(Batching):
    """A batch changes nothing but the costs."""


def test_empty_batch(engine: LlamaEngine) -> None:
    """A scheduler with nothing to do needs no special case."""
    assert engine.decode_batch([]) == []
    answer(engine, PROMPT, 1)


# Failure


def fail_in_layer(engine: LlamaEngine, session: Session, layer: int) -> None:
    """Leave the KV memory just so much room that a layer is the first which cannot grow."""
    with engine.slots.borrow(session) as state:
        capacity = state.kv_cache.layers[0].shape[2]
        missing = 2 * capacity - state.kv_length
        per_layer = state.kv_cache.layers[0].nbytes
    # A layer that doubles needs twice its bytes before it gives back the old ones.
    engine.memory.limit = engine.memory.used + (layer + 1) * per_layer + per_layer // 2
    # Fill the cache to the brim, so that it is the next call that must grow.
    engine.prefill(session, [1] * (missing - capacity))


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
@pytest.mark.parametrize("call", ["decode", "prefill", "prompt", "decode_batch"])
def test_failed_step_leaves_no_trace(engine: LlamaEngine, call: str, layer: int) -> None:
    """A step that runs out of memory in the middle of the model, and succeeds when tried again."""
    with Session() as session, Session() as other:
        engine.prefill(session, PROMPT)
        engine.prefill(other, OTHER)
        fail_in_layer(engine, session, layer)
        before = look(engine, session), look(engine, other)
        steps: dict[str, Callable[[], object]] = {
            "decode": lambda: engine.decode(session),
            "prefill": lambda: engine.prefill(session, OTHER),
            "prompt": lambda: engine.prompt(session, PROMPT + [1] * 10 + OTHER + PROMPT),
            "decode_batch": lambda: engine.decode_batch([other, session]),
        }
        with pytest.raises(MemoryError, match=f"layer {layer + 1} of {NUM_LAYERS}: no room"):
            steps[call]()
        tokens, cached = before[0]
        if call == "prompt":  # It had cut off what the histories do not share; that is only cache.
            cached = len(PROMPT) + 10
        assert (look(engine, session), look(engine, other)) == ((tokens, cached), before[1])
        engine.memory.limit = None
        tokens, other_tokens = decode(engine, session, 10), decode(engine, other, 10)
        assert tokens == answer(engine, before[0][0], 10)
        assert other_tokens == answer(engine, OTHER, 10)


@pytest.mark.parametrize("length", [len(PROMPT), 25, 0])
@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_torn_layers_are_cut_to_what_all_have(
    engine: LlamaEngine, model: Llama, layer: int, length: int
) -> None:
    """Some layers have grown and hold tokens of a pass that failed: none of them counts."""
    cache = engine.slots.create()
    model.forward([(cache, np.array(PROMPT, np.int32))])
    capacity = cache.layers[0].shape[2]
    per_layer = cache.layers[0].nbytes
    engine.memory.limit = engine.memory.used + (layer + 1) * per_layer + per_layer // 2
    with pytest.raises(MemoryError, match=f"layer {layer + 1} of {NUM_LAYERS}"):
        model.forward([(cache, np.array(OTHER * 2, np.int32))])
    assert [grown.shape[2] > capacity for grown in cache.layers] == [
        index < layer for index in range(NUM_LAYERS)
    ]
    assert engine.slots.length(cache) == len(PROMPT)
    engine.memory.limit = None

    assert engine.slots.truncate is not None
    cut = engine.slots.truncate(cache, length)
    assert engine.slots.length(cut) == length
    hidden = model.forward([(cut, np.array(OTHER, np.int32))])
    expected = logits_after(model, PROMPT[:length] + OTHER)
    assert model.logits(hidden)[0] == pytest.approx(expected, abs=1e-3)
    engine.memory.release(cut)


def test_interrupted_sampler_leaves_no_trace(engine: LlamaEngine) -> None:
    """Ctrl-C when the model was fed already, but the token is not there yet."""

    def interrupted(logits: Floats, position: int) -> int:
        raise KeyboardInterrupt

    with Session() as session:
        engine.prefill(session, PROMPT)
        before = look(engine, session)
        with pytest.raises(KeyboardInterrupt):
            engine.decode(session, sample=interrupted)
        assert look(engine, session) == before
        assert decode(engine, session, 10) == answer(engine, PROMPT, 10)


def test_prefill_stops_when_the_session_is_closed(
    engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that goes away during a long prefill does not keep the engine busy to its end."""
    session = Session()
    forward = Llama.forward
    passes = Counter[str]()

    def closing(model: Llama, batch: Batch) -> Floats:
        passes["forward"] += 1
        session.close()
        return forward(model, batch)

    monkeypatch.setattr(Llama, "forward", closing)
    with pytest.raises(SessionClosedError):
        engine.prefill(session, PROMPT)
    assert passes["forward"] == 1


@pytest.mark.parametrize(
    "tokens",
    [
        [1, 2, VOCAB_SIZE],
        [1, -1],
        [1, -(2**40)],
        [1, 2**70],
        [1, 2**40],
        [1.0, 2.0],
        ["1"],
        [None],
        [[1, 2]],
        [True, False],
    ],
    ids=[
        "unknown",
        "negative",
        "very-negative",
        "huge",
        "large",
        "floats",
        "text",
        "none",
        "nested",
        "bools",
    ],
)
@pytest.mark.parametrize("call", ["prefill", "prompt"])
def test_bad_tokens_change_nothing(engine: LlamaEngine, call: str, tokens: list[int]) -> None:
    """What is no token of the model is refused before anything happens."""
    with Session() as session:
        engine.prefill(session, PROMPT)
        before = look(engine, session)
        with pytest.raises(ValueError, match=r"flat sequence of ints|not in the vocabulary"):
            getattr(engine, call)(session, tokens)
        assert look(engine, session) == before
        assert decode(engine, session, 5) == answer(engine, PROMPT, 5)


def test_empty_session_is_refused(engine: LlamaEngine) -> None:
    """There is nothing to decode from, alone or in a batch, and the rest of the batch is spared."""
    with Session() as session, Session() as empty:
        engine.prefill(session, PROMPT)
        before = look(engine, session)
        with pytest.raises(ValueError, match="session is empty"):
            engine.decode(empty)
        with pytest.raises(ValueError, match="session is empty"):
            engine.decode_batch([session, empty])
        with pytest.raises(ValueError, match="session is empty"):
            next(engine.answer(session, whole([]), 5))
        assert look(engine, session) == before
        assert empty.token_count == 0


def test_context_is_as_long_as_it_is(engine: LlamaEngine) -> None:
    """The last token of the context can be decoded, and not one more, by no call."""
    too_long = PROMPT * (CONTEXT_LENGTH // len(PROMPT)) + [1]
    with Session() as session:
        engine.prefill(session, too_long[: CONTEXT_LENGTH - 1])
        engine.decode(session)
        before = look(engine, session)
        for call in (
            lambda: engine.decode(session),
            lambda: engine.prefill(session, [1]),
            lambda: engine.prompt(session, too_long),
        ):
            with pytest.raises(ValueError, match="do not fit in a context of 200"):
                call()
            assert look(engine, session) == before
        assert session.token_count == CONTEXT_LENGTH


# Streaming and sampling


def test_stream_keeps_what_it_handed_out(engine: LlamaEngine) -> None:
    """A consumer that walks away has what the history has, and the conversation goes on."""
    with Session() as session:
        engine.prefill(session, PROMPT)
        stream = engine.stream(session, 50)
        taken = [next(stream) for _ in range(7)]
        stream.close()
        assert look(engine, session)[0] == PROMPT + taken
        assert taken + decode(engine, session, 8) == answer(engine, PROMPT, 15)


def test_stream_does_not_hold_the_session(engine: LlamaEngine) -> None:
    """While a consumer takes its time, the session can be looked at, evicted and closed."""
    session = Session()
    engine.prefill(session, PROMPT)
    stream = engine.stream(session, 50)
    taken = [next(stream), next(stream)]
    assert session.token_count == len(PROMPT) + 2
    engine.slots.evict(session)
    taken.append(next(stream))
    assert taken == answer(engine, PROMPT, 3)
    session.close()
    with pytest.raises(SessionClosedError):
        next(stream)


def test_stream_ends(engine: LlamaEngine) -> None:
    """A stream ends after so many tokens, or with a stop token, which it still hands out."""
    expected = answer(engine, PROMPT, 12)
    stop = expected[5]
    with Session() as session:
        engine.prefill(session, PROMPT)
        assert list(engine.stream(session, 4)) == expected[:4]
        assert list(engine.stream(session, 50, stop={stop})) == expected[4:6]


def whole(tokens: Sequence[int]) -> Callable[[Sequence[int]], Sequence[int]]:
    """Return a prompt for `LlamaEngine.answer` that is the whole history, whatever it was."""
    return lambda history: tokens


def test_answer_is_prompt_and_stream(engine: LlamaEngine) -> None:
    """An answer has the tokens of `prompt` and `stream`, reuses as much, and says what it fed."""
    chunks = [16, 16, len(PROMPT) - 33]  # All but the last token.
    expected = answer(engine, PROMPT, 12)
    with Session() as session:
        steps = list(engine.answer(session, whole(PROMPT), 12))
        assert [step.fed for step in steps] == chunks + 12 * [1]
        assert [step.token for step in steps] == len(chunks) * [None] + expected
        steps = list(engine.answer(session, lambda history: [*history, 5], 3, stop={0}))
        assert [step.fed for step in steps][:2] == [1, 1]  # The last token, and the new one.
        assert [step.token for step in steps][1:] == answer(engine, [*PROMPT, *expected, 5], 3)
        (last,) = engine.answer(session, whole(PROMPT), 9, stop={expected[0]})
        assert (last.fed, last.token) == (1, expected[0])


def test_answer_holds_the_session(engine: LlamaEngine) -> None:
    """Nobody steps a session between two tokens of an answer; closing it ends the answer."""
    session = Session()
    steps = engine.answer(session, whole(PROMPT), 50)
    while next(steps).token is None:
        with pytest.raises(SessionBusyError):
            engine.decode(session)
    with pytest.raises(SessionBusyError):
        engine.prefill(session, OTHER)
    session.close()
    with pytest.raises(SessionClosedError):
        next(steps)
    assert engine.memory.released == 1


@pytest.mark.parametrize("taken", range(1, 6))
def test_answer_ends_when_the_session_is_closed(engine: LlamaEngine, taken: int) -> None:
    """Between two chunks of the prompt and between two tokens, it ends before the next one."""
    session = Session()
    steps = engine.answer(session, whole(PROMPT), 50)
    for _ in range(taken):
        next(steps)
    session.close()
    with pytest.raises(SessionClosedError):
        next(steps)
    assert engine.memory.released == 1


@pytest.mark.parametrize("steps", range(6))
def test_answer_broken_off(engine: LlamaEngine, steps: int) -> None:
    """Closed in mid-prompt it leaves no trace; closed later, the session has what was handed out."""
    with Session() as session:
        engine.prefill(session, OTHER)
        broken = engine.answer(session, whole(PROMPT), 50)
        taken = [next(broken).token for _ in range(steps)]
        broken.close()
        tokens = [token for token in taken if token is not None]
        history, _ = look(engine, session)
        assert history == (PROMPT + tokens if tokens else OTHER)
        assert decode(engine, session, 5) == answer(engine, history, 5)


def test_answer_is_as_long_as_the_context(engine: LlamaEngine) -> None:
    """An answer ends where the context does; a prompt that leaves no room for one is refused."""
    long = (PROMPT * 5)[:CONTEXT_LENGTH]
    with Session() as session:
        steps = list(engine.answer(session, whole(long[3:]), 50))
        assert [step.token is None for step in steps].count(False) == 3
        before = look(engine, session)
        with pytest.raises(ValueError, match="do not fit in a context of 200"):
            next(engine.answer(session, whole(long), 1))
        assert look(engine, session) == before


def test_busy_session_is_refused(engine: LlamaEngine) -> None:
    """No call steps a session that is being stepped, and a batch has no session twice."""
    with Session() as session, Session() as other:
        engine.prefill(session, PROMPT)
        engine.prefill(other, OTHER)
        before = look(engine, other)
        with engine.slots.borrow(session):
            for call in (
                lambda: engine.prefill(session, OTHER),
                lambda: engine.prompt(session, OTHER),
                lambda: engine.decode(session),
                lambda: engine.decode_batch([other, session]),
            ):
                with pytest.raises(SessionBusyError):
                    call()
        with pytest.raises(SessionBusyError):
            engine.decode_batch([session, session])
        assert look(engine, other) == before


def test_sampling_depends_on_nothing_but_the_seed(engine: LlamaEngine) -> None:
    """Sampled answers can be replayed, and sessions that alternate do not disturb each other."""

    def sampled(seed: int, *, evict: bool = False) -> list[int]:
        with Session() as session, Session() as other:
            engine.prefill(session, PROMPT)
            engine.prefill(other, OTHER)
            tokens: list[int] = []
            for _ in range(15):
                tokens.append(engine.decode(session, sample=sampling(seed=seed)).token)
                if evict:
                    engine.decode(other, sample=sampling(seed=seed))
                    engine.slots.evict(session)
            return tokens

    assert sampled(1) == sampled(1, evict=True)
    assert len({tuple(sampled(seed)) for seed in range(4)}) == 4


def test_sampling_draws_from_the_distribution() -> None:
    """Frequencies are those of the softmax at the temperature, cut to the nucleus."""
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    draws = 4000

    def frequencies(temperature: float, top_p: float) -> list[float]:
        sample = sampling(temperature=temperature, top_p=top_p, seed=3)
        counts = Counter(sample(logits, position) for position in range(draws))
        return [counts[token] / draws for token in range(4)]

    assert frequencies(1.0, 1.0) == pytest.approx([0.1, 0.5, 0.15, 0.25], abs=0.03)
    assert frequencies(1.0, 0.7) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.03)
    squares = np.array([0.1, 0.5, 0.15, 0.25]) ** 2
    assert frequencies(0.5, 1.0) == pytest.approx(squares / squares.sum(), abs=0.03)
    assert frequencies(1.0, 0.4) == [0, 1, 0, 0]
    assert frequencies(5e-324, 1.0) == [0, 1, 0, 0]  # As small as a float can be.
    assert greedy(logits, 0) == 1


@pytest.mark.parametrize(
    ("temperature", "top_p", "seed"), [(0, 1, 0), (-1, 1, 0), (1, 0, 0), (1, 1.5, 0), (1, 1, -1)]
)
def test_sampling_refuses_what_makes_no_sense(temperature: float, top_p: float, seed: int) -> None:
    """Wrong numbers are an error at once, not strange text later."""
    with pytest.raises(ValueError, match="sampling needs"):
        sampling(temperature=temperature, top_p=top_p, seed=seed)


# Branches and files


@pytest.mark.parametrize("length", [1, 25, len(PROMPT) + 5])
def test_branches_answer_as_sessions_of_their_own(engine: LlamaEngine, length: int) -> None:
    """A branch has the cache of its tokens, and neither it nor its parent notices what the other does."""
    with Session() as session:
        engine.prefill(session, PROMPT)
        history = PROMPT + decode(engine, session, 5)
        with engine.slots.borrow(session) as state:
            child = state.branch(length)
        with child:
            assert look(engine, child) == (history[:length], length - 1)
            engine.prefill(child, OTHER)
            tokens = [(engine.decode(child).token, engine.decode(session).token) for _ in range(10)]
        assert [first for first, _ in tokens] == answer(engine, history[:length] + OTHER, 10)
        assert [second for _, second in tokens] == answer(engine, PROMPT, 15)[5:]


def test_saved_session_goes_on(engine: LlamaEngine, model: Llama, tmp_path: Path) -> None:
    """Restored by another engine of the same model, it feeds one token, and answers as if undisturbed."""
    path = tmp_path / "session"
    with Session() as session:
        engine.prefill(session, PROMPT)
        history = PROMPT + decode(engine, session, 5)
        engine.slots.save(session, path)
    other = LlamaEngine(model)
    with other.slots.restore(path) as restored:
        assert look(other, restored) == (history, len(history) - 1)
        (step,) = other.answer(restored, lambda tokens: tokens, 1)
        assert step.fed == 1
        assert [step.token, *decode(other, restored, 9)] == answer(engine, history, 10)
    assert other.memory.used == 0


def test_file_of_another_model(
    engine: LlamaEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its KV cache is refused, with a warning; its tokens are there, and answered by this model."""
    path = tmp_path / "session"
    other = LlamaEngine(random_model(1, num_layers=2))
    with Session() as session:
        other.prefill(session, PROMPT)
        other.slots.save(session, path)
    with engine.slots.restore(path) as restored:
        assert caplog.messages == [
            f"restored session {restored.id} without its KV cache: load raised ValueError"
        ]
        assert look(engine, restored) == (PROMPT, 0)
        assert decode(engine, restored, 5) == answer(engine, PROMPT, 5)


def written(engine: LlamaEngine, tokens: Sequence[int]) -> bytes:
    """Return what the engine writes of a KV cache of tokens."""
    file = io.BytesIO()
    cache = engine.memory.create()
    engine.model.forward([(cache, np.array(tokens, np.int32))])
    cache.dump(file)
    engine.memory.release(cache)
    return file.getvalue()


def saved(array: NDArray[Any]) -> bytes:
    """Return what NumPy writes of an array."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_load_says_what_is_wrong(engine: LlamaEngine) -> None:
    """An array of another model is named, and neither a part of a file nor objects to unpickle are read."""
    smaller = LlamaEngine(random_model(1, num_layers=2))
    whole = written(engine, PROMPT)
    wrong = {
        r"\(2, 2, 2, 23, 8\) of float32, .* wants \(3, 2, 2, 23, 8\) of": written(smaller, OTHER),
        r"\(3, 2, 2, 5, 8\) of float16": saved(np.zeros((3, 2, 2, 5, 8), np.float16)),
        "Object arrays cannot be loaded": saved(np.array([{}], object)),
        "reading array data": whole[:-1],
        "reading magic string": b"",
    }
    for message, data in wrong.items():
        with pytest.raises(ValueError, match=message):
            engine.memory.load(io.BytesIO(data))
    cache = engine.memory.load(io.BytesIO(whole))
    assert cache.length == len(PROMPT)
    engine.memory.release(cache)


def test_no_room_for_another_cache(engine: LlamaEngine, tmp_path: Path) -> None:
    """A branch that doesn't fit is an error, a restored cache that doesn't is computed later; nothing is leaked."""
    path = tmp_path / "session"
    with Session() as session:
        engine.prefill(session, PROMPT)
        engine.slots.save(session, path)
        held = engine.memory.used
        engine.memory.limit = held * 3 // 2
        with (
            pytest.raises(MemoryError, match=f"of {NUM_LAYERS}: no room"),
            engine.slots.borrow(session) as state,
        ):
            state.branch()
        with engine.slots.restore(path) as restored:
            assert engine.memory.used == held
            engine.memory.limit = None
            assert decode(engine, restored, 5) == decode(engine, session, 5)


def test_cache_does_not_grow_by_truncation(engine: LlamaEngine) -> None:
    """A cache never claims tokens that it does not have, and is freed once."""
    cache = engine.memory.create()
    engine.model.forward([(cache, np.array(PROMPT, np.int32))])
    lengths = [cache.truncate(length).length for length in (len(PROMPT) + 1, 9, 10, 0)]
    assert lengths == [len(PROMPT), 9, 9, 0]
    engine.memory.release(cache)
    with pytest.raises(ValueError, match="released twice"):
        engine.memory.release(cache)


def test_garbage_gives_its_memory_back(engine: LlamaEngine) -> None:
    """A session that was forgotten in a cycle is released by the garbage collector, with a warning."""
    session = Session()
    engine.prefill(session, PROMPT)
    cycle: list[object] = [session]
    cycle.append(cycle)
    del session, cycle
    with pytest.warns(ResourceWarning, match="unclosed"):
        gc.collect()
    assert engine.memory.used == 0


def test_chunks_have_a_token(model: Llama) -> None:
    """A chunk size that could never get anywhere is refused at once."""
    with pytest.raises(ValueError, match="one token at least"):
        LlamaEngine(model, chunk=0)
