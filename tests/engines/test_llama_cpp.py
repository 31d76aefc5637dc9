"""The engine over llama.cpp: sequence ids are scarce, one context serves all, and nothing of it shows."""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import llama_cpp as L  # noqa: N812
import pytest
from tests.engines.gguf_models import write_llama, write_mamba
from tests.engines.serving import OTHER, PROMPT, PROMPTS, VOCAB_SIZE, Serving, answer, decode, look

import smollm2
from inference_session import Session
from inference_session.exceptions import (
    SessionBusyError,
    SessionClosedError,
    StateMismatchError,
)
from inference_session.testing import parametrize_with_checks
from llama_cpp_engine import (
    KVCacheFullError,
    LlamaContext,
    LlamaCppEngine,
    OutOfSequencesError,
)


MAX_SEQUENCES = 4
FILLING = [[*prompt, 1] for prompt in PROMPTS]
"""Prompts for all sequences: each has a token to feed, and one to keep."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a small Llama."""
    return write_llama(tmp_path_factory.mktemp("models") / "llama.gguf")


@pytest.fixture
def engine(path: Path) -> Iterator[LlamaCppEngine]:
    """Give an engine, and check in the end that no sequence is taken and the KV cache is empty."""
    engine = LlamaCppEngine(
        LlamaContext(
            path,
            max_sequences=MAX_SEQUENCES,
            n_ctx=256,
            n_batch=32,
            n_ubatch=8,
            n_threads=1,
            exact=True,
        )
    )
    yield engine
    gc.collect()
    assert free_sequences(engine) == MAX_SEQUENCES
    assert [native_length(engine, number) for number in range(MAX_SEQUENCES)] == [0] * MAX_SEQUENCES


def free_sequences(engine: LlamaCppEngine) -> int:
    """Count the sequences that can be taken."""
    taken = 0
    with ExitStack() as held:
        while True:
            try:
                sequence = engine.context.create()
            except OutOfSequencesError:
                return taken
            held.callback(engine.context.release, sequence)
            taken += 1


def native_length(engine: LlamaCppEngine, number: int) -> int:
    """Return how many tokens llama.cpp itself has of a sequence."""
    return int(L.llama_memory_seq_pos_max(engine.context._memory, number)) + 1


@cache
def model_for_kit() -> Path:
    """Write a small Llama to a temporary directory, and return its path."""
    directory = tempfile.TemporaryDirectory()
    atexit.register(directory.cleanup)
    return write_llama(Path(directory.name, "kit.gguf"))


@parametrize_with_checks(
    lambda: LlamaCppEngine(
        LlamaContext(model_for_kit(), n_ctx=512, n_threads=1, exact=True), chunk=4
    ),
    vocab_size=VOCAB_SIZE,
)
def test_kit(check: Callable[[], None]) -> None:
    """The engine keeps every promise of `inference_session.testing`."""
    check()


# What a session says does not depend on how it is served


class TestServing(Serving):
    """What a session says does not depend on how it is served."""


def test_batch_decode_is_single_decode(engine: LlamaCppEngine) -> None:
    """A batch computes what each of its sessions would alone, whatever each must catch up with."""
    alone = [answer(engine, prompt, 20) for prompt in PROMPTS]
    with ExitStack() as closing:
        sessions = [closing.enter_context(Session()) for _ in PROMPTS]
        for session, prompt in zip(sessions, PROMPTS, strict=True):
            engine.prefill(session, prompt)
        steps: list[list[int]] = []
        for step in range(20):
            if step % 3 == 2:
                engine.slots.evict(sessions[step % len(sessions)])
            steps.append([result.token for result in engine.decode_batch(sessions)])
    assert [list(tokens) for tokens in zip(*steps, strict=True)] == alone


def test_batch_decode_is_one_llama_decode(
    engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are read once for a whole batch, and a session that decodes has but one row."""
    rows: list[int] = []
    native = L.llama_decode

    def counted(context: L.llama_context_p, batch: L.llama_batch) -> int:
        rows.append(batch.n_tokens)
        return int(native(context, batch))

    with ExitStack() as closing:
        sessions = [closing.enter_context(Session()) for _ in PROMPTS]
        for session, prompt in zip(sessions, PROMPTS, strict=True):
            engine.prefill(session, prompt)
        monkeypatch.setattr(L, "llama_decode", counted)
        engine.decode_batch(sessions)
    assert rows == [len(PROMPTS)]


def test_empty_batch(engine: LlamaCppEngine) -> None:
    """A scheduler with nothing to do needs no special case."""
    assert engine.decode_batch([]) == []


def test_long_prefill_is_chunked(engine: LlamaCppEngine) -> None:
    """No more than n_batch tokens go into a call, which would end the process, and it doesn't show."""
    prompt = (PROMPT + OTHER) * 3
    assert len(prompt) > 5 * engine.context.n_batch
    with Session() as session:
        engine.prefill(session, prompt)
        assert look(engine, session) == (prompt, len(prompt) - 1)
        tokens = decode(engine, session, 10)
    with Session() as session:
        for token in prompt:
            engine.prefill(session, [token])
        assert decode(engine, session, 10) == tokens


def test_half_precision_answers_alike(path: Path, engine: LlamaCppEngine) -> None:
    """A KV cache as llama.cpp makes it by default serves, too: `exact` is for tests."""
    rounded = LlamaCppEngine(LlamaContext(path, n_ctx=256, n_threads=1))
    assert answer(rounded, PROMPT, 5) == answer(engine, PROMPT, 5)


# Sequences are scarce


def fill(engine: LlamaCppEngine, closing: ExitStack) -> list[Session]:
    """Return as many sessions as there are sequences."""
    sessions = [closing.enter_context(Session()) for _ in PROMPTS]
    assert len(sessions) == MAX_SEQUENCES
    for session, prompt in zip(sessions, FILLING, strict=True):
        engine.prefill(session, prompt)
    return sessions


def test_out_of_sequences(engine: LlamaCppEngine) -> None:
    """One session too many is refused, with nothing changed, by an error that says what to do."""
    expected = [answer(engine, prompt, 5) for prompt in FILLING]
    with ExitStack() as closing:
        sessions = fill(engine, closing)
        more = closing.enter_context(Session())
        for _ in range(3):
            with pytest.raises(OutOfSequencesError, match=r"all 4 .* close a .*slots\.evict"):
                engine.prefill(more, PROMPT)
        assert more.token_count == 0
        engine.prefill(more, PROMPT[:1])  # It is only kept, to be fed when there is more.
        with pytest.raises(OutOfSequencesError):
            engine.decode_batch([*sessions, more])
        assert [decode(engine, session, 5) for session in sessions] == expected


def test_eviction_frees_a_sequence(engine: LlamaCppEngine) -> None:
    """Any session makes room for another, by turns, and none of them loses anything."""
    expected = [answer(engine, prompt, 6) for prompt in [*FILLING, OTHER[3:]]]
    with ExitStack() as closing:
        sessions = fill(engine, closing)
        tokens: list[list[int]] = [[] for _ in expected]
        sessions.append(closing.enter_context(Session()))
        engine.slots.evict(sessions[0])
        engine.prefill(sessions[-1], OTHER[3:])
        for _ in range(6):
            for number, session in enumerate(sessions):
                engine.slots.evict(sessions[(number + 1) % len(sessions)])
                tokens[number].append(engine.decode(session).token)
    assert tokens == expected


def test_closing_and_forgetting_free_a_sequence(engine: LlamaCppEngine) -> None:
    """What a session held is there for the next, whether it was closed or only dropped."""
    expected = answer(engine, PROMPT, 5)
    sessions = fill(engine, ExitStack())
    sessions[2].close()
    assert answer(engine, PROMPT, 5) == expected
    with pytest.warns(ResourceWarning, match="unclosed"):
        del sessions
    assert answer(engine, PROMPT, 5) == expected


def test_released_sequence_makes_room_at_once(engine: LlamaCppEngine) -> None:
    """The cells of a closed session are there for another that has its sequence already."""
    with Session() as session:
        with Session() as large:
            engine.prefill(large, PROMPT * 5)
            engine.prefill(session, PROMPT[:1])
        engine.prefill(session, PROMPT * 5)
        assert session.token_count == 201


def test_length_is_that_of_llama_cpp(engine: LlamaCppEngine) -> None:
    """A KV cache that was changed behind the session's back is found out, and computed anew."""
    with Session() as session:
        engine.prefill(session, PROMPT)
        with pytest.raises(StateMismatchError) as error, engine.slots.borrow(session) as state:
            L.llama_memory_seq_rm(engine.context._memory, state.kv_cache.id, 20, -1)
        assert (error.value.expected, error.value.actual) == (39, 20)
        assert look(engine, session) == (PROMPT, 0)
        assert decode(engine, session, 5) == answer(engine, PROMPT, 5)


def test_nbytes(engine: LlamaCppEngine) -> None:
    """The bytes of a session grow with its tokens, and are those of keys and values, or little more."""
    keys_and_values = 2 * 2 * 2 * 16 * 4  # both, layers, heads, dimensions, bytes of a float32
    with Session() as session:
        for _ in range(3):
            engine.prefill(session, PROMPT)
            with engine.slots.borrow(session) as state:
                size = engine.context.nbytes(state.kv_cache) / (state.kv_length * keys_and_values)
                assert 1 <= size < 1.2


# Failure


def test_kv_cache_overflows(engine: LlamaCppEngine) -> None:
    """A full KV cache refuses a step as a whole; with another session evicted, it goes on as ever."""
    expected = answer(engine, PROMPT * 4, 10)
    with Session() as session, Session() as other:
        engine.prefill(other, PROMPT * 2)
        with pytest.raises(KVCacheFullError, match=r"cache of 256: close a .*slots\.evict"):
            engine.prefill(session, PROMPT * 5)  # Some chunks of it had room.
        assert look(engine, session) == ([], 0)
        engine.prefill(session, PROMPT * 4)
        before = look(engine, session), look(engine, other)
        while before[0][1] + before[1][1] < 256:
            engine.decode_batch([session, other])
            before = look(engine, session), look(engine, other)
        with pytest.raises(KVCacheFullError):
            engine.decode_batch([session, other])
        assert (look(engine, session), look(engine, other)) == before
        engine.slots.evict(other)
        engine.decode(session)
        assert look(engine, session)[0][160:170] == expected
    assert issubclass(KVCacheFullError, MemoryError)


def test_aborted_step_leaves_no_trace(engine: LlamaCppEngine) -> None:
    """A step that llama.cpp aborts half-way leaves tokens in its KV cache, and the session has none of it."""
    calls: list[int] = []
    left: list[int] = []

    def abort(data: ctypes.c_void_p) -> bool:
        calls.append(1)
        return len(calls) > 100

    callback, never = L.ggml_abort_callback(abort), L.ggml_abort_callback()
    with Session() as session:
        engine.prefill(session, PROMPT)
        before = look(engine, session)
        L.llama_set_abort_callback(engine.context._context, callback, ctypes.c_void_p())
        with (  # noqa: PT012
            pytest.raises(RuntimeError, match=r"aborted \(code 2\)"),
            engine.slots.borrow(session) as state,
            ExitStack() as at_the_end,
        ):
            sequence = state.kv_cache
            at_the_end.callback(lambda: left.append(native_length(engine, sequence.id)))
            state.append(OTHER)
            engine.context.feed([(sequence, state.pending)])
        L.llama_set_abort_callback(engine.context._context, never, ctypes.c_void_p())
        assert len(PROMPT) <= left[0] < len(PROMPT) + len(OTHER)
        assert look(engine, session) == before
        assert decode(engine, session, 10) == answer(engine, PROMPT, 10)


@pytest.mark.parametrize(
    ("code", "message"), [(2, "aborted"), (-1, "refused the batch"), (-3, "failed")]
)
@pytest.mark.parametrize("call", ["decode", "prefill", "decode_batch"])
def test_failed_step_leaves_no_trace(
    engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch, call: str, code: int, message: str
) -> None:
    """Whatever a call that says it failed did to the KV cache, the step can be tried again."""
    native = L.llama_decode

    def fail(context: L.llama_context_p, batch: L.llama_batch) -> int:
        assert native(context, batch) == 0
        return code

    with Session() as session, Session() as other:
        engine.prefill(session, PROMPT)
        engine.prefill(other, OTHER)
        before = look(engine, session), look(engine, other)
        steps: dict[str, Callable[[], object]] = {
            "decode": lambda: engine.decode(session),
            "prefill": lambda: engine.prefill(session, OTHER),
            "decode_batch": lambda: engine.decode_batch([other, session]),
        }
        with monkeypatch.context() as patch:
            patch.setattr(L, "llama_decode", fail)
            with pytest.raises(RuntimeError, match=rf"{message} \(code {code}\)"):
                steps[call]()
        assert (look(engine, session), look(engine, other)) == before
        assert decode(engine, session, 10) == answer(engine, PROMPT, 10)


def test_batch_that_is_too_large(engine: LlamaCppEngine) -> None:
    """What would end the process is refused before llama.cpp sees it."""
    sequence = engine.context.create()
    with pytest.raises(ValueError, match="33 tokens are too many for a batch of 32"):
        engine.context.feed([(sequence, [1] * 33)])
    assert engine.context.length(sequence) == 0
    engine.context.release(sequence)


def test_context_is_as_long_as_it_is(engine: LlamaCppEngine) -> None:
    """The last token of the context can be decoded, and not one more, by no call."""
    with Session() as session:
        engine.prefill(session, (PROMPT * 7)[:255])
        engine.decode(session)
        before = look(engine, session)
        for call in (
            lambda: engine.decode(session),
            lambda: engine.prefill(session, [1]),
            lambda: engine.prompt(session, PROMPT * 7),
        ):
            with pytest.raises(ValueError, match="do not fit in a context of 256"):
                call()
            assert look(engine, session) == before


def test_closing_stops_a_long_prefill(
    engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that is closed in mid-step is not fed the rest, and its sequence is given back."""
    session = Session()
    native = L.llama_decode
    calls: list[int] = []

    def close(context: L.llama_context_p, batch: L.llama_batch) -> int:
        calls.append(batch.n_tokens)
        if len(calls) == 2:
            closer = threading.Thread(target=session.close)
            closer.start()
            closer.join()
        return int(native(context, batch))

    monkeypatch.setattr(L, "llama_decode", close)
    with pytest.raises(SessionClosedError):
        engine.prefill(session, PROMPT * 5)
    assert len(calls) == 2


# One context, many threads


def test_threads_share_the_context(engine: LlamaCppEngine) -> None:
    """Each session in a thread of its own says what it says alone, while others come and go."""
    expected = [answer(engine, prompt, 30) for prompt in PROMPTS[:2]]
    found: list[list[int]] = [[], []]
    stop = threading.Event()
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            for _ in range(10):
                found[number] = answer(engine, PROMPTS[number], 30)
                assert found[number] == expected[number]
        except BaseException as error:  # noqa: BLE001
            errors.append(error)
        stop.set()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    while not stop.is_set():
        with Session() as session:
            engine.prefill(session, OTHER)
            threading.Thread(target=session.close).start()
    for thread in threads:
        thread.join()
    assert not errors
    assert found == expected


def test_two_threads_at_one_session(
    engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second to step a session is refused at once: it doesn't wait for llama.cpp."""
    native = L.llama_decode
    inside, over = threading.Event(), threading.Event()

    def slow(context: L.llama_context_p, batch: L.llama_batch) -> int:
        inside.set()
        assert over.wait(60)
        return int(native(context, batch))

    with Session() as session:
        engine.prefill(session, PROMPT)
        monkeypatch.setattr(L, "llama_decode", slow)
        tokens: list[int] = []
        thread = threading.Thread(target=lambda: tokens.append(engine.decode(session).token))
        thread.start()
        assert inside.wait(60)
        with pytest.raises(SessionBusyError):
            engine.decode(session)
        over.set()
        thread.join()
        monkeypatch.undo()
        assert tokens == answer(engine, PROMPT, 1)


def test_release_waits_for_nobody(engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a step is in llama.cpp, other sessions are closed at once, and by that very thread, too."""
    native = L.llama_decode
    others = [Session() for _ in range(2)]
    for other in others:
        engine.prefill(other, OTHER)

    def close_others(context: L.llama_context_p, batch: L.llama_batch) -> int:
        others.pop().close()
        closer = threading.Thread(target=others.pop().close)
        closer.start()
        closer.join(60)
        assert not closer.is_alive()
        return int(native(context, batch))

    with Session() as session:
        engine.prefill(session, PROMPT)
        monkeypatch.setattr(L, "llama_decode", close_others)
        token = engine.decode(session).token
        monkeypatch.undo()
        assert [token] == answer(engine, PROMPT, 1)


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals there")
def test_interrupts_lose_no_sequence(engine: LlamaCppEngine) -> None:
    """Ctrl-C at any instant, also of taking a sequence, leaves none that nobody has."""
    expected = answer(engine, PROMPT, 3)

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    interrupts = 0
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with Session() as session:
            for attempt in range(1500):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 1e-6 + attempt % 300 * 1e-6)
                    engine.slots.evict(session)
                    engine.prefill(session, PROMPT[:2])
                    engine.prompt(session, PROMPT[1:2])
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    interrupts += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interrupts > 500
    assert free_sequences(engine) == MAX_SEQUENCES
    assert answer(engine, PROMPT, 3) == expected


# The end of a context


def test_sessions_outlive_the_engine(path: Path) -> None:
    """A context lives as long as a session that has a sequence of it, which can still be closed."""
    engine = LlamaCppEngine(LlamaContext(path, n_threads=1))
    freed = engine.context._freed
    session = Session()
    engine.prefill(session, PROMPT)
    slots = engine.slots
    del engine
    assert freed.alive
    with slots.borrow(session) as state:
        state.rewind(10)
    del slots, state
    assert freed.alive
    session.close()
    assert not freed.alive


def test_engine_and_sessions_are_garbage_together(path: Path) -> None:
    """Whatever the garbage collector takes first, nothing is used that is freed."""
    engine = LlamaCppEngine(LlamaContext(path, n_threads=1))
    freed = engine.context._freed
    session = Session()
    engine.prefill(session, PROMPT)
    cycle: list[object] = [engine, session]
    cycle.append(cycle)
    del engine, session, cycle
    with pytest.warns(ResourceWarning, match="unclosed"):
        gc.collect()
    assert not freed.alive


EXIT = """
import os, sys, threading, time
from pathlib import Path
from inference_session import Session
from llama_cpp_engine import LlamaContext, LlamaCppEngine

engine = LlamaCppEngine(LlamaContext(Path(sys.argv[1]), n_threads=1, max_sequences=8))
sessions = [Session() for _ in range(4)]
for session in sessions:
    engine.prefill(session, range(20))

def step(session):
    try:
        while True:
            engine.prompt(session, range(100))
    except RuntimeError as error:
        assert "about to exit" in str(error)
        time.sleep(60)

if "threads" in sys.argv:
    for session in sessions[:2]:
        threading.Thread(target=step, args=(session,), daemon=True).start()
    time.sleep(0.3)
if "fork" in sys.argv:
    child = os.fork()
    if child:
        pid, status = os.waitpid(child, 0)
        assert status == 0
if "cycle" in sys.argv:
    sessions.append(sessions)
print("bye")
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own."""
    paths = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, *arguments],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": paths, "GGML_NO_BACKTRACE": "1"},
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize("how", ["threads", "fork", "threads fork", "cycle", "nothing"])
def test_interpreter_exits(path: Path, how: str) -> None:
    """An exit with sessions open, also while threads step them or in a forked child, is a quiet one."""
    if "fork" in how and not hasattr(os, "fork"):
        pytest.skip("no fork there")
    run = python(EXIT, str(path), *how.split())
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.split() == ["bye"] * (2 if "fork" in how else 1)


UNGUARDED = """
import sys
from pathlib import Path
from llama_cpp import llama_batch_init
from llama_cpp_engine import LlamaContext

context = LlamaContext(Path(sys.argv[1]), n_batch=64, n_threads=1)
context.n_batch, context._batch = 1000, llama_batch_init(1000, 0, 1)
context.feed([(context.create(), [1] * 65)])
print("survived")
"""


def test_guard_is_needed(path: Path) -> None:
    """Without the limit on batches, llama.cpp would end the process, and every session in it."""
    run = python(UNGUARDED, str(path))
    assert run.returncode not in {0, 1}
    assert run.stdout == ""


# Models and what is missing


def test_model_whose_state_cannot_be_truncated(path: Path) -> None:
    """A Mamba has one state for all tokens: what can't be taken back is computed anew."""
    engine = LlamaCppEngine(
        LlamaContext(write_mamba(path.with_name("mamba.gguf")), n_threads=1, n_batch=16)
    )
    assert engine.slots.truncate is None
    with Session() as session, Session() as other:
        engine.prefill(session, PROMPT)
        engine.prefill(other, OTHER)
        tokens = decode(engine, session, 10)
        assert engine.prompt(session, PROMPT) == 0
        decode(engine, other, 5)
        assert decode(engine, session, 10) == tokens
    assert len(set(tokens)) > 3


@pytest.mark.parametrize(("max_sequences", "n_batch"), [(0, 32), (33, 32), (257, 512)])
def test_wrong_number_of_sequences(path: Path, max_sequences: int, n_batch: int) -> None:
    """What llama.cpp can't do, or a batch couldn't hold, is refused at once."""
    with pytest.raises(ValueError, match="max_sequences must be from 1 to"):
        LlamaContext(path, max_sequences=max_sequences, n_batch=n_batch)


def test_file_that_is_no_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A wrong path is an error in Python, which names it."""
    with pytest.raises(ValueError, match=r"cannot load .*none\.gguf"):
        LlamaContext(tmp_path / "none.gguf")
    capfd.readouterr()


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without llama.cpp, the error says how to install it."""
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.delitem(sys.modules, "llama_cpp_engine")
    with pytest.raises(ImportError, match="pip install llama-cpp-python=="):
        importlib.import_module("llama_cpp_engine")


# A real model


def test_chat() -> None:
    """SmolLM2 answers as it was trained to, and a second turn is fed only what is new."""
    path = smollm2.find_weights()
    tokenizer = smollm2.load_tokenizer(path)
    engine = LlamaCppEngine(LlamaContext(path, n_threads=1))
    turns: list[smollm2.Message] = [
        ("system", "Answer in one short sentence."),
        ("user", "What is the capital of France?"),
    ]
    with Session() as session:
        answers: list[str] = []
        reused: list[int] = []
        for question in ["And of Italy?", ""]:
            reused.append(engine.prompt(session, tokenizer.encode_chat(turns)))
            tokens: list[int] = []
            while tokenizer.end_of_turn not in tokens and len(tokens) < 20:
                tokens.append(engine.decode(session).token)
            answers.append(tokenizer.decode(tokens))
            turns.append(("assistant", answers[-1]))
            turns.append(("user", question))
        assert answers == ["The capital of France is Paris.", "The capital of Italy is Rome."]
        assert reused[0] == 0
        assert reused[1] > 30
