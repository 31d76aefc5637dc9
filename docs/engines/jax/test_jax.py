"""The engine in JAX: its arithmetic, and caches that are replaced, kept and gone back to."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import io
import runpy
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray
from tests.saving import Saving, check_computed_anew, go_on_elsewhere, saved
from tests.serving import OTHER, PROMPT, VOCAB_SIZE, RefusingTokens, Serving, decode, look

import jax_engine
from inference_session import Session
from inference_session.exceptions import SessionBusyError, SessionClosedError
from inference_session.testing import parametrize_with_checks
from jax_engine import JaxEngine, KVCache, Model, forward, random_model


# In float64 the order of sums doesn't show in the tokens.
jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call]  # noqa: FBT003

CONTEXT_LENGTH = 100
CHUNK = 8
NUM_LAYERS = 3
MODEL = random_model(1, vocab_size=VOCAB_SIZE)


@pytest.fixture
def engine() -> JaxEngine:
    """Give an engine; all of them share what is compiled, as their shapes are the same."""
    return new_engine()


@pytest.fixture
def session() -> Iterator[Session]:
    """Give a session, and close it in the end."""
    with Session() as session:
        yield session


def new_engine() -> JaxEngine:
    """Return an engine whose chunks are short enough for a prompt to have several."""
    return JaxEngine(MODEL, context_length=CONTEXT_LENGTH, chunk=CHUNK)


# The arithmetic

Numbers = NDArray[np.float64]


def naive_logits(model: Model, tokens: Sequence[int]) -> Numbers:
    """Compute the logits after some tokens in NumPy: no cache, no padding, head by head."""
    embedding, query_key_value, attention_output, ups, downs, output = map(np.asarray, model)
    layers, _, _, heads, dim = query_key_value.shape
    frequencies = 100.0 ** -np.linspace(0, 1, dim // 2)
    turns = np.exp(1j * np.outer(np.arange(len(tokens)), frequencies))

    def norm(x: Numbers) -> Numbers:
        normed: Numbers = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5)
        return normed

    def turn(vectors: Numbers) -> Numbers:
        turned = (vectors[:, : dim // 2] + 1j * vectors[:, dim // 2 :]) * turns
        return np.concatenate([turned.real, turned.imag], axis=1)

    x = embedding[list(tokens)]
    for layer in range(layers):
        normed, attended = norm(x), np.zeros_like(x)
        for head in range(heads):
            matrices = query_key_value[layer, :, :, head]
            query, key = (turn(normed @ matrices[:, which]) for which in (0, 1))
            for now in range(len(tokens)):
                seen = np.exp(key[: now + 1] @ query[now] / np.sqrt(dim))
                mixed = seen / seen.sum() @ (normed[: now + 1] @ matrices[:, 2])
                attended[now] += mixed @ attention_output[layer, head]
        x = x + attended
        up = norm(x) @ ups[layer]
        x = x + up / (1 + np.exp(-up)) @ downs[layer]
    logits: Numbers = norm(x[-1]) @ output
    return logits


def plain(prompt: Sequence[int], tokens: int) -> list[int]:
    """Continue a prompt with neither session nor cache: the whole text anew for each token."""
    text = list(prompt)
    while len(text) < len(prompt) + tokens:
        text.append(int(naive_logits(MODEL, text).argmax()))
    return text[len(prompt) :]


def fed(engine: JaxEngine, tokens: Sequence[int]) -> tuple[NDArray[np.float64], KVCache]:
    """Feed tokens one by one; return the logits and the cache."""
    cache, logits = engine.slots.create(), jnp.zeros(VOCAB_SIZE)
    for token in tokens:
        logits, keys, values = forward(MODEL, cache, jnp.array([token]), 1)
        cache = KVCache(keys, values, cache.length + 1)
    return np.asarray(logits), cache


def test_logits_are_those_of_the_textbook(engine: JaxEngine) -> None:
    """The cached and padded arithmetic computes what the model is defined to be."""
    assert fed(engine, PROMPT)[0] == pytest.approx(naive_logits(MODEL, PROMPT), abs=1e-9)


def test_logits_depend_on_every_token() -> None:
    """The random model is worth testing with: no token of the prompt can be lost unseen."""
    logits = naive_logits(MODEL, PROMPT)
    for position, token in enumerate(PROMPT):
        other = [*PROMPT[:position], (token + 1) % VOCAB_SIZE, *PROMPT[position + 1 :]]
        assert np.abs(naive_logits(MODEL, other) - logits).max() > 0.1


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_logits_depend_on_the_cache_of_every_layer(engine: JaxEngine, layer: int) -> None:
    """The random model is worth testing with: no layer's cache can be torn unseen."""
    _, cache = fed(engine, PROMPT[:-1])
    for place in range(0, len(PROMPT) - 1, 5):
        torn = cache._replace(
            keys=cache.keys.at[layer, place].set(0), values=cache.values.at[layer, place].set(0)
        )
        logits, _, _ = forward(MODEL, torn, jnp.array(PROMPT[-1:]), 1)
        assert np.abs(logits - naive_logits(MODEL, PROMPT)).max() > 0.02


# The conformance kit


@parametrize_with_checks(new_engine, vocab_size=VOCAB_SIZE)
def test_engine(check: Callable[[], None]) -> None:
    """The engine keeps a promise."""
    check()


# What a session says does not depend on how it is served


class TestServing(Serving):
    """The tests of all engines."""


# Prefill and decode


def test_tokens_are_those_of_the_textbook(engine: JaxEngine, session: Session) -> None:
    """Prefill and decode together are greedy decoding of the model, and the history tells so."""
    added = engine.prefill(session, PROMPT).tokens_processed
    tokens = decode(engine, session, 15)
    assert (added, tokens) == (len(PROMPT), plain(PROMPT, 15))
    assert look(engine, session) == (PROMPT + tokens, len(PROMPT + tokens) - 1)


def compilations() -> int:
    """Return for how many shapes the model is compiled."""
    return cast("Any", forward)._cache_size()  # type: ignore[no-any-return]


def test_nothing_is_compiled_for_a_length(engine: JaxEngine, session: Session) -> None:
    """A conversation costs the compilation of two shapes, however it grows."""
    engine.prefill(session, PROMPT)
    engine.decode(session)
    compiled = compilations()
    for length in range(1, 20):
        engine.prefill(session, OTHER[:length] if length % 2 else OTHER[:1])
        if session.token_count < CONTEXT_LENGTH - 25:
            engine.decode(session)
        else:
            engine.slots.evict(session)
            with engine.slots.borrow(session) as state:
                state.rewind(length)
    assert compilations() == compiled


def test_context_is_as_long_as_it_is(engine: JaxEngine, session: Session) -> None:
    """The last place can be used, also by a padded chunk, and not one more."""
    long = (PROMPT + OTHER) * 2
    engine.prefill(session, long[: CONTEXT_LENGTH - 2])
    with pytest.raises(ValueError, match="101 tokens do not fit in a context of 100"):
        engine.prefill(session, [1, 2, 3])
    assert decode(engine, session, 2) == plain(long[: CONTEXT_LENGTH - 2], 2)
    engine.slots.evict(session)
    with pytest.raises(ValueError, match="101 tokens do not fit"):
        engine.decode(session)
    with engine.slots.borrow(session) as state:
        state.rewind(CONTEXT_LENGTH - 1)
    assert decode(engine, session, 1) == plain(long[: CONTEXT_LENGTH - 2], 2)[1:]


@pytest.mark.parametrize("pending", [0, 1, 5])
def test_rewind_keeps_the_arrays(engine: JaxEngine, session: Session, pending: int) -> None:
    """A cache that is cut has another length and the same arrays, and nothing is computed anew."""
    engine.prefill(session, PROMPT)
    with engine.slots.borrow(session) as state:
        old = state.kv_cache
        state.rewind(20, pending=pending)
        assert state.kv_length == 20 - pending
        assert state.kv_cache.keys is old.keys
        assert state.kv_cache.values is old.values
    assert decode(engine, session, 5) == plain(PROMPT[:20], 5)


def test_truncate_claims_nothing(engine: JaxEngine) -> None:
    """A cache never claims tokens that it doesn't have."""
    assert engine.slots.truncate is not None
    _, cache = fed(engine, PROMPT)
    assert [engine.slots.truncate(cache, length).length for length in (0, 9, 99)] == [0, 9, 40]


def test_session_covered_to_its_end_can_be_decoded(engine: JaxEngine, session: Session) -> None:
    """An application of its own may have fed all tokens: the last one is fed again."""
    with engine.slots.borrow(session) as state:
        state.append(PROMPT)
        state.kv_cache = fed(engine, PROMPT)[1]
        state.advance(len(PROMPT))
    assert decode(engine, session, 5) == plain(PROMPT, 5)


def test_nbytes_is_what_is_held(engine: JaxEngine, session: Session) -> None:
    """A budget counts keys and values of all layers, padding included."""
    engine.prefill(session, PROMPT)
    assert engine.slots.nbytes is not None
    with engine.slots.borrow(session) as state:
        size = 2 * NUM_LAYERS * (CONTEXT_LENGTH + CHUNK) * 32 * 8
        assert engine.slots.nbytes(state.kv_cache) == size


# Failure

FAULTS: list[type[BaseException]] = [MemoryError, RuntimeError, KeyboardInterrupt]


def cache_of(engine: JaxEngine, session: Session) -> KVCache:
    """Return a session's cache."""
    with engine.slots.borrow(session) as state:
        return state.kv_cache


def is_back(engine: JaxEngine, session: Session, old: KVCache) -> bool:
    """Return whether a session has the arrays of an old cache, and covers as many tokens."""
    now = cache_of(engine, session)
    return now.keys is old.keys and now.values is old.values and now.length == old.length


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("step", [("prefill", 0), ("prefill", 2), ("decode", 0)])
def test_failed_step_goes_back_to_the_old_arrays(
    engine: JaxEngine,
    session: Session,
    step: tuple[str, int],
    fault: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is computed anew, whether the step had set a new cache already or not."""
    call, done = step
    engine.prefill(session, PROMPT)
    before = look(engine, session)
    old = cache_of(engine, session)
    passes = count()

    def failing(*args: object) -> object:
        outcome = forward(*args)
        if next(passes) == done:
            raise fault
        return outcome

    steps: dict[str, Callable[[], object]] = {
        "prefill": lambda: engine.prefill(session, OTHER),
        "decode": lambda: engine.decode(session),
    }
    with monkeypatch.context() as patch:
        patch.setattr(jax_engine, "forward", failing)
        with pytest.raises(fault):
            steps[call]()
    assert look(engine, session) == before
    assert is_back(engine, session, old)
    assert decode(engine, session, 5) == plain(PROMPT, 5)


def decode_and_fail(engine: JaxEngine, session: Session, fault: type[BaseException]) -> None:
    """Decode a token, and fail when only the commit is missing."""
    with engine.slots.borrow(session) as state:
        old = state.kv_cache
        state.append([int(engine._feed(state, state.pending, 1).argmax())])
        assert state.kv_cache.keys is not old.keys
        raise fault


@pytest.mark.parametrize("fault", FAULTS)
def test_step_that_fails_at_its_end_goes_back_to_the_old_arrays(
    engine: JaxEngine, session: Session, fault: type[BaseException]
) -> None:
    """So it is when the session has the new cache already, and only the commit is missing."""
    engine.prefill(session, PROMPT)
    before = look(engine, session)
    old = cache_of(engine, session)
    with pytest.raises(fault):
        decode_and_fail(engine, session, fault)
    assert look(engine, session) == before
    assert is_back(engine, session, old)
    assert decode(engine, session, 5) == plain(PROMPT, 5)


def test_step_that_fails_later_is_not_committed(
    engine: JaxEngine, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JAX may report a failure only when a result is needed, which must not be after the commit."""
    engine.prefill(session, PROMPT)
    before = look(engine, session)

    has_memory = False

    def keep(keys: jax.Array) -> jax.Array:
        if has_memory:
            return keys
        raise MemoryError

    @jax.jit
    def slow(matrix: jax.Array) -> jax.Array:
        def multiply(_: int, power: jax.Array) -> jax.Array:
            return power @ matrix

        power: jax.Array = jax.lax.fori_loop(0, 60, multiply, matrix)
        return power

    @jax.jit
    def keep_later(keys: jax.Array, after: jax.Array) -> jax.Array:
        failed: jax.Array = jax.pure_callback(keep, keys, keys)
        return failed

    slow(jnp.eye(500))

    def fails_in_the_end(
        model: Model, cache: KVCache, tokens: jax.Array, count: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits, keys, values = forward(model, cache, tokens, count)
        return logits, keep_later(keys, slow(jnp.eye(500))), values

    with monkeypatch.context() as patch:
        patch.setattr(jax_engine, "forward", fails_in_the_end)
        with pytest.raises(Exception, match="MemoryError"):
            engine.prefill(session, OTHER[:CHUNK])
    has_memory = True
    np.asarray(
        keep_later(jnp.zeros(1), jnp.zeros(1))
    )  # When Python ends, JAX asks how the last one did.
    assert look(engine, session) == before
    assert decode(engine, session, 5) == plain(PROMPT, 5)


def test_prefill_stops_when_the_session_is_closed(
    engine: JaxEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that goes away during a long prefill does not keep the engine busy to its end."""
    session = Session()
    passes = Counter[str]()

    def closing(*args: object) -> object:
        passes["forward"] += 1
        session.close()
        return forward(*args)

    monkeypatch.setattr(jax_engine, "forward", closing)
    with pytest.raises(SessionClosedError):
        engine.prefill(session, PROMPT)
    assert passes["forward"] == 1


# Files and branches


class TestSaving(Saving):
    """A session goes on the same in a file and in a branch."""


def test_restored_elsewhere(engine: JaxEngine, tmp_path: Path) -> None:
    """A session goes on in another process, whose caches may be larger, and needs nothing of this one."""
    tokens, expected = saved(engine, tmp_path / "session")
    code = f"""
import jax
jax.config.update("jax_enable_x64", True)
from jax_engine import JaxEngine, random_model
engine = JaxEngine(random_model(1, vocab_size={VOCAB_SIZE}))
"""
    assert go_on_elsewhere(code, tmp_path / "session") == [len(tokens) - 1, *expected]


@pytest.mark.parametrize("number", [False, True])
def test_file_of_another_model(
    engine: JaxEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture, *, number: bool
) -> None:
    """A KV cache is taken only by the model it was computed with: all weights, or some, tell."""
    saved(engine, tmp_path / "session")
    slightly = MODEL._replace(down=MODEL.down + 1e-3)
    other = JaxEngine(slightly if number else random_model(2, vocab_size=VOCAB_SIZE))
    check_computed_anew(other, tmp_path / "session", caplog, "load raised ValueError")


@pytest.mark.parametrize("context", [False, True])
def test_file_that_does_not_fit(
    engine: JaxEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture, *, context: bool
) -> None:
    """A KV cache of other numbers, or of more tokens than there is room for, isn't taken."""
    tokens, _ = saved(engine, tmp_path / "session")
    rounded = Model(*(weights.astype(jnp.float32) for weights in MODEL))
    other = JaxEngine(MODEL, context_length=44) if context else JaxEngine(rounded)
    with other.slots.restore(tmp_path / "session") as session:
        assert look(other, session) == (tokens, 0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("size", [0, 10, 16, 20, 24, 100, -1])
def test_file_that_ends_early(engine: JaxEngine, session: Session, size: int) -> None:
    """A file cut off anywhere is an error, never a cache with a part of the tokens."""
    file = io.BytesIO()
    engine.prefill(session, PROMPT)
    with engine.slots.borrow(session) as state:
        engine._dump(state.kv_cache, file)
    with pytest.raises((ValueError, struct.error)):
        engine._load(io.BytesIO(file.getvalue()[:size]))


def test_file_of_bfloat16() -> None:
    """A kind of number that NumPy doesn't know is written and read, too."""
    engine = JaxEngine(Model(*(weights.astype(jnp.bfloat16) for weights in MODEL)))
    empty, file = engine.slots.create(), io.BytesIO()
    keys, values = (
        jax.random.normal(jax.random.key(seed), empty.keys.shape, jnp.bfloat16) for seed in (1, 2)
    )
    engine._dump(KVCache(keys, values, 50), file)
    file.seek(0)
    cache = engine._load(file)
    assert cache.length == 50
    for found, expected in (cache.keys, keys), (cache.values, values):
        assert found.dtype == jnp.bfloat16
        assert bool((found[:, :50] == expected[:, :50]).all())


def test_branch_has_the_same_arrays(engine: JaxEngine, session: Session) -> None:
    """Arrays that never change are shared for nothing."""
    engine.prefill(session, PROMPT)
    with engine.slots.borrow(session) as state, state.branch(20) as child:
        parent = state.kv_cache
        with engine.slots.borrow(child) as other:
            assert other.kv_cache.keys is parent.keys
            assert other.kv_cache.values is parent.values


# What is refused


class TestTokens(RefusingTokens):
    """Only ints of the vocabulary get as far as the history."""


def test_empty_session_is_refused(engine: JaxEngine, session: Session) -> None:
    """There is nothing to decode from."""
    assert engine.prefill(session, []).tokens_processed == 0
    with pytest.raises(ValueError, match="session is empty"):
        engine.decode(session)


def test_busy_session_is_refused(engine: JaxEngine, session: Session) -> None:
    """No call steps a session that is being stepped."""
    with engine.slots.borrow(session), pytest.raises(SessionBusyError):
        engine.prefill(session, PROMPT)
    engine.prefill(session, PROMPT)
    with engine.slots.borrow(session), pytest.raises(SessionBusyError):
        engine.decode(session)


def test_missing_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the engine without its library learns what to do."""
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(ModuleNotFoundError, match=r"no jax: .*pip install jax==") as error:
        runpy.run_path(str(Path(jax_engine.__file__)))
    assert error.value.name == "jax"
