"""The engine over MLX: every layer counts, nothing is left to be computed later, any thread may step."""

# MLX and mlx-lm are typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache, partial
from typing import cast

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache
from mlx_lm.models.llama import Model, TransformerBlock
from tests.engines.serving import OTHER, PROMPT, PROMPTS, VOCAB_SIZE, Serving, answer, decode, look

import mlx_engine
from inference_session import Session
from inference_session.exceptions import (
    SessionBusyError,
    SessionClosedError,
    StateMismatchError,
)
from inference_session.testing import parametrize_with_checks
from mlx_engine import LayerCache, MLXEngine, random_model


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
        return [layer.offset for layer in state.kv_cache]


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
            assert nbytes(make_prompt_cache(engine.model)) == 0


# Every layer counts


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_layers_that_disagree_are_found_out(engine: MLXEngine, layer: int) -> None:
    """A layer that has fewer tokens than the others, be it the last, is never decoded from."""
    with Session() as session:
        engine.prefill(session, PROMPT)
        with (
            pytest.raises(RuntimeError, match="different numbers of tokens"),
            engine.slots.borrow(session) as state,
        ):
            state.kv_cache[layer].trim(3)
        assert look(engine, session) == (PROMPT, 0)
        assert decode(engine, session, 10) == answer(engine, PROMPT, 10)


def test_over_trimming_is_found_out(engine: MLXEngine) -> None:
    """mlx-lm trims what there is if told to trim more; truncating to more than there is, is an error."""
    caches = make_prompt_cache(engine.model)
    engine.model(mx.array([PROMPT]), cache=caches)
    with pytest.raises(ValueError, match="to 41 tokens, as it has fewer"):
        mlx_engine.truncate(caches, 41)
    caches[2].trim(5)
    with pytest.raises(ValueError, match="to 36 tokens, as it has fewer"):
        mlx_engine.truncate(caches, 36)
    assert [layer.offset for layer in caches] == [40, 40, 35]
    assert mlx_engine.length(mlx_engine.truncate(caches, 35)) == 35


def test_trimming_behind_the_session_is_found_out(engine: MLXEngine) -> None:
    """All layers agree, but not with the history."""
    with Session() as session:
        engine.prefill(session, PROMPT)
        with pytest.raises(StateMismatchError) as error, engine.slots.borrow(session) as state:
            trim_prompt_cache(state.kv_cache, 100)
        assert (error.value.expected, error.value.actual) == (39, 0)
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
        if block is engine.model.layers[layer]:
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
