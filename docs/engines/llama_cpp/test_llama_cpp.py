"""The engine over llama.cpp: sequence ids are scarce, one context serves all, and nothing of it shows."""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import io
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from unittest.mock import Mock

import llama_cpp as L  # noqa: N812
import numpy as np
import pytest
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

import smollm2
from gguf_models import (
    WINDOW,
    write_gemma,
    write_jamba,
    write_lfm2,
    write_llama,
    write_mamba,
)
from inference_session import Session
from inference_session.engine import TORN
from inference_session.exceptions import (
    SessionBusyError,
    SessionClosedError,
    StateMismatchError,
)
from inference_session.testing import parametrize_with_checks
from llama_cpp_engine import (
    KVCacheFullError,
    KVSequence,
    LlamaContext,
    LlamaCppEngine,
    OutOfSequencesError,
    _identify,
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
def model(write: Callable[[Path], Path]) -> Path:
    """Write a small model to a temporary directory, and return its path."""
    directory = tempfile.TemporaryDirectory()
    atexit.register(directory.cleanup)
    return write(Path(directory.name, "model.gguf"))


@parametrize_with_checks(
    lambda: LlamaCppEngine(
        LlamaContext(model(write_llama), n_ctx=512, n_threads=1, exact=True), chunk=4
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
        assert (error.value.expected, error.value.actual) == (39, TORN)
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


# Files and branches


class TestSaving(Saving):
    """A session goes on the same in a file and in a branch."""


def test_restored_elsewhere(engine: LlamaCppEngine, path: Path, tmp_path: Path) -> None:
    """A session goes on in another process, and needs nothing of this one."""
    tokens, expected = saved(engine, tmp_path / "session")
    code = f"""
from pathlib import Path
from llama_cpp_engine import LlamaContext, LlamaCppEngine
engine = LlamaCppEngine(LlamaContext(Path({str(path)!r}), n_threads=1, exact=True))
"""
    assert go_on_elsewhere(code, tmp_path / "session") == [len(tokens) - 1, *expected]


@pytest.mark.parametrize(
    ("write", "options"),
    [
        pytest.param(partial(write_llama, seed=1), {}, id="weights"),
        pytest.param(write_gemma, {}, id="windows"),
        pytest.param(write_mamba, {}, id="states"),
        pytest.param(write_llama, {"exact": False}, id="precision"),
        pytest.param(write_llama, {"swa_full": True}, id="swa_full"),
    ],
)
def test_file_of_another_model(
    engine: LlamaCppEngine,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    write: Callable[[Path], Path],
    options: dict[str, bool],
) -> None:
    """A KV cache is taken only by the model, and the kind of context, it was computed with."""
    saved(engine, tmp_path / "session")
    other = LlamaCppEngine(LlamaContext(model(write), n_threads=1, **{"exact": True, **options}))
    check_computed_anew(other, tmp_path / "session", caplog, "load raised ValueError")
    assert free_sequences(other) == 8


def test_weights_are_told_apart_anywhere(tmp_path: Path) -> None:
    """Of a large file, samples from all over it are compared, not its beginning alone."""
    path, digests = tmp_path / "weights", set[bytes]()
    for place in [None, 0, 2_000_000, 3_999_999]:
        content = bytearray(4_000_000)
        if place is not None:
            content[place - place % 500_000 : place + 1] = b"x" * (place % 500_000 + 1)
        path.write_bytes(content)
        digests.add(_identify(path))
    assert len(digests) == 4


def test_file_without_room(
    engine: LlamaCppEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A KV cache that finds no sequence, or no room in one, is computed anew when there is."""
    saved(engine, tmp_path / "session")
    with Session() as large:
        engine.prefill(large, PROMPT * 6)
        with engine.slots.restore(tmp_path / "session") as session:
            assert "KVCacheFullError" in caplog.messages[-1]
            large.close()
            decode(engine, session, 1)
    with ExitStack() as closing:
        sessions = fill(engine, closing)
        session = closing.enter_context(engine.slots.restore(tmp_path / "session"))
        assert "OutOfSequencesError" in caplog.messages[-1]
        with engine.slots.borrow(sessions[1]) as state, pytest.raises(OutOfSequencesError):
            state.branch()
        sessions[0].close()
        decode(engine, session, 1)
    assert len(caplog.records) == 2


@pytest.mark.parametrize("size", [0, 10, 16, 20, 32, 100, -1])
def test_file_that_ends_early(engine: LlamaCppEngine, size: int) -> None:
    """A file cut off anywhere is an error in Python: llama.cpp gets what it needs, or nothing."""
    file = io.BytesIO()
    with Session() as session:
        engine.prefill(session, PROMPT)
        with engine.slots.borrow(session) as state:
            engine.context.dump(state.kv_cache, file)
    with pytest.raises((ValueError, struct.error)):
        engine.context.load(io.BytesIO(file.getvalue()[:size]))


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["llama_memory_seq_cp", "llama_state_seq_set_data_ext"])
def test_failed_branch_or_file_loses_no_sequence(
    engine: LlamaCppEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    error: type[BaseException],
) -> None:
    """A sequence that was taken for a branch or a file is free again if it isn't used."""
    saved(engine, tmp_path / "session")
    with Session() as session:
        engine.prefill(session, PROMPT)
        with monkeypatch.context() as patch:
            patch.setattr(L, name, Mock(side_effect=error))
            with suppress(error), engine.slots.borrow(session) as state:
                state.branch().close()
            with suppress(error), engine.slots.restore(tmp_path / "session") as restored:
                assert restored.token_count == 46
        gc.collect()
        assert free_sequences(engine) == MAX_SEQUENCES - 1
        assert decode(engine, session, 10) == answer(engine, PROMPT, 10)


def test_state_that_cannot_be_copied(
    engine: LlamaCppEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If llama.cpp fails to give the bytes, there is no file."""
    with Session() as session:
        engine.prefill(session, PROMPT)
        monkeypatch.setattr(L, "llama_state_seq_get_data_ext", Mock(return_value=0))
        with pytest.raises(RuntimeError, match="can't copy the state"):
            engine.slots.save(session, tmp_path / "session")
    assert not list(tmp_path.iterdir())


# Windows, recurrent and hybrid models

SLIDING = {"gemma": write_gemma}
STATEFUL = {"mamba": write_mamba, "jamba": write_jamba, "lfm2": write_lfm2}
LONG: list[int] = np.random.default_rng(9).integers(0, VOCAB_SIZE, 200).tolist()


def make_engine(
    kind: str, *, chunk: int = 64, checkpoints: int = 8, swa_full: bool = False
) -> LlamaCppEngine:
    """Return an engine, in whose memory for windows there is room for those of all sequences, and little more."""
    hidden = 2
    context = LlamaContext(
        model({**SLIDING, **STATEFUL}[kind]),
        max_sequences=8 + hidden,
        n_ctx=1536,
        n_batch=64,
        n_ubatch=8,
        n_threads=1,
        swa_full=swa_full,
        checkpoints=checkpoints,
        exact=True,
    )
    context.max_sequences -= hidden
    if kind != "mamba" and not swa_full:
        # llama.cpp makes it for 256 tokens at least. Those that two sequences share stay.
        filler = KVSequence(context.max_sequences)
        for _ in range(4):
            context.feed([(filler, LONG[:46])])
        L.llama_memory_seq_cp(context._memory, filler.id, filler.id + 1, -1, -1)
    return LlamaCppEngine(context, chunk=chunk)


@pytest.fixture(params=[*SLIDING, *STATEFUL])
def other(request: pytest.FixtureRequest) -> Iterator[LlamaCppEngine]:
    """Give an engine of a model whose KV cache can't be cut anywhere, and check that it is left empty."""
    engine = make_engine(request.param)
    yield engine
    assert free_sequences(engine) == engine.context.max_sequences
    assert {native_length(engine, number) for number in range(engine.context.max_sequences)} == {0}


def feed(engine: LlamaCppEngine, sequence: KVSequence, tokens: list[int]) -> list[float]:
    """Feed a sequence, in small parts, and return the last logits."""
    logits: list[float] = []
    for start in range(0, len(tokens), 16):
        (last,) = engine.context.feed([(sequence, tokens[start : start + 16])])
        logits = last.tolist()
    return logits


def computed_anew(engine: LlamaCppEngine, tokens: list[int]) -> list[float]:
    """Return the logits of a sequence that nothing was removed of."""
    sequence = engine.context.create()
    logits = feed(engine, sequence, tokens)
    engine.context.release(sequence)
    return logits


def kit(kind: str) -> pytest.MarkDecorator:
    """Return what makes the checks of `inference_session.testing`."""
    return parametrize_with_checks(
        partial(make_engine, kind, chunk=4), vocab_size=VOCAB_SIZE, max_examples=8
    )


@kit("gemma")
def test_kit_sliding(check: Callable[[], None]) -> None:
    """The engine keeps every promise where layers see a window only, soon to be overwritten."""
    check()


@kit("mamba")
def test_kit_recurrent(check: Callable[[], None]) -> None:
    """The engine keeps every promise where there is but a state."""
    check()


@kit("jamba")
def test_kit_hybrid(check: Callable[[], None]) -> None:
    """The engine keeps every promise where there is a state, and layers that attend."""
    check()


class TestServingOthers(Serving):
    """What a session says does not depend on how it is served, where a KV cache can't be cut anywhere."""

    @pytest.fixture
    def engine(self, other: LlamaCppEngine) -> LlamaCppEngine:
        """Give such an engine."""
        return other

    def check_reused(self, reused: int, common: int) -> None:
        """Where it can't be cut, it's reused as far as there is a checkpoint, as where the prompt ended."""
        assert reused <= common
        if common >= 39:
            assert reused >= 39


class TestSavingOthers(Saving):
    """A session goes on the same in a file and in a branch, where a KV cache can't be cut anywhere."""

    @pytest.fixture
    def engine(self, other: LlamaCppEngine) -> LlamaCppEngine:
        """Give such an engine."""
        return other

    def check_shared(self, covered: int, most: int) -> None:
        """Where it can't be cut, it's shared as far as there is a checkpoint, as where the prompt ended."""
        assert covered <= most
        if most >= 39:
            assert covered >= 39


@pytest.mark.parametrize("memory", ["of a window", "of all"])
@pytest.mark.parametrize("kind", [*SLIDING, *STATEFUL])
def test_branches_need_no_more_room_than_sessions(kind: str, memory: str) -> None:
    """As many sessions as there are sequences grow side by side, whether they are branches or not."""
    engine = make_engine(kind, swa_full=memory == "of all")
    expected = [answer(engine, [*LONG[:120], number], 30) for number in range(8)]
    with ExitStack() as closing:
        sessions = [closing.enter_context(Session())]
        engine.prefill(sessions[0], LONG[:120])
        for _ in range(7):
            with engine.slots.borrow(sessions[-1]) as state:
                sessions.append(closing.enter_context(state.branch()))
        assert {look(engine, session)[1] for session in sessions} == {119}
        for number, session in enumerate(sessions):
            engine.prefill(session, [number])
        steps = [engine.decode_batch(sessions) for _ in range(30)]
    found = [[result.token for result in results] for results in zip(*steps, strict=True)]
    assert found == expected


@pytest.mark.parametrize("memory", ["of a window", "of all"])
@pytest.mark.parametrize("kind", [*SLIDING, *STATEFUL])
def test_truncate_lands_where_all_is_there(kind: str, memory: str) -> None:
    """Whatever is asked for, what is kept goes on as if the rest had never been."""
    engine = make_engine(kind, swa_full=memory == "of all")
    context = engine.context
    sequence = context.create()
    landed: list[int] = []
    for length in [120, 119, 101, 100, 75, 64, 50, 40, 33, 20, WINDOW + 1, WINDOW, 5, 1, 0]:
        context.truncate(sequence, 0)
        feed(engine, sequence, LONG[:120])
        kept = context.length(context.truncate(sequence, length))
        assert kept <= length
        landed.append(length - kept)
        logits = feed(engine, sequence, LONG[kept:length] + OTHER)
        np.testing.assert_allclose(
            logits, computed_anew(engine, LONG[:length] + OTHER), rtol=0, atol=1e-3
        )
    assert landed[0] == 0
    assert max(landed) <= 40
    if memory == "of all" and kind in SLIDING:
        assert max(landed) == 0
    context.release(sequence)


@pytest.mark.parametrize("missing", [0, 1, 3])
def test_removal_that_succeeds_is_wrong(missing: int) -> None:
    """Why `truncate` must look: llama.cpp removes tokens, says nothing, and the next one sees too few."""
    engine = make_engine("gemma")
    memory, sequence = engine.context._memory, engine.context.create()
    feed(engine, sequence, LONG[:120])
    first = L.llama_memory_seq_pos_min(memory, sequence.id)
    assert 40 < first <= 120 - WINDOW
    cut = first + WINDOW - 1 - missing
    assert L.llama_memory_seq_rm(memory, sequence.id, cut, -1)
    sequence.length = cut
    assert engine.context.length(sequence) == cut
    logits = feed(engine, sequence, OTHER[:1])
    difference = np.subtract(logits, computed_anew(engine, LONG[:cut] + OTHER[:1]))
    assert (np.abs(difference).max() > 0.01) == (missing > 0)

    engine.context.truncate(sequence, 0)
    feed(engine, sequence, LONG[:120])
    assert L.llama_memory_seq_pos_min(memory, sequence.id) == first
    kept = engine.context.length(engine.context.truncate(sequence, cut))
    assert (0 < kept < cut) if missing else kept == cut


def test_state_has_another_length_than_llama_cpp_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why tokens are counted: after a call that fails, states are ahead, and positions don't show it."""
    engine = make_engine("jamba")
    native = L.llama_decode

    def fail(context: L.llama_context_p, batch: L.llama_batch) -> int:
        assert native(context, batch) == 0
        return -3

    with Session() as session:
        engine.prefill(session, PROMPT)
        expected = answer(engine, [*PROMPT, 5], 10)
        with monkeypatch.context() as patch:
            patch.setattr(L, "llama_decode", fail)
            with (  # noqa: PT012
                pytest.raises(RuntimeError, match="code -3"),
                engine.slots.borrow(session) as state,
            ):
                try:
                    engine.context.feed([(state.kv_cache, [7])])
                finally:
                    assert native_length(engine, state.kv_cache.id) == 40
                    assert engine.context.length(state.kv_cache) == TORN
        engine.prefill(session, [5])
        assert decode(engine, session, 10) == expected


@contextmanager
def aborting(engine: LlamaCppEngine, after: float) -> Generator[list[int]]:
    """Have llama.cpp abort after so many nodes of its graphs, and count them."""
    nodes: list[int] = []

    def abort(data: ctypes.c_void_p) -> bool:
        nodes.append(1)
        return len(nodes) > after

    callback, never = L.ggml_abort_callback(abort), L.ggml_abort_callback()
    L.llama_set_abort_callback(engine.context._context, callback, ctypes.c_void_p())
    try:
        yield nodes
    finally:
        L.llama_set_abort_callback(engine.context._context, never, ctypes.c_void_p())


STEPS: dict[str, Callable[[LlamaCppEngine, Session, Session], object]] = {
    "prefill": lambda engine, session, _: engine.prefill(session, OTHER),
    "prompt": lambda engine, session, _: engine.prompt(session, PROMPT[:30] + OTHER),
    "decode": lambda engine, session, _: engine.decode(session),
    "decode_batch": lambda engine, session, second: engine.decode_batch([second, session]),
}


@pytest.mark.parametrize("share", [0, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("step", STEPS)
def test_aborted_step_can_be_tried_again(other: LlamaCppEngine, step: str, share: float) -> None:
    """Whatever layers a step had changed when it was aborted, the next one has the result of the first."""

    def serve(after: float) -> tuple[int, list[int]]:
        with Session() as session, Session() as second:
            other.prefill(session, PROMPT)
            other.prefill(second, LONG[:100])
            other.decode_batch([session, second])
            before = look(other, session)[0], look(other, second)[0]
            with aborting(other, after) as nodes:
                if after < np.inf:
                    with pytest.raises(RuntimeError, match=r"aborted \(code 2\)"):
                        STEPS[step](other, session, second)
                    assert (look(other, session)[0], look(other, second)[0]) == before
            with aborting(other, np.inf) as nodes:
                STEPS[step](other, session, second)
            return len(nodes), [*decode(other, session, 8), *decode(other, second, 8)]

    nodes, expected = serve(np.inf)
    assert serve(int(nodes * share))[1] == expected


def test_aborted_batch_of_others() -> None:
    """To have the states of a batch side by side, llama.cpp moves that of a session that isn't in it.

    If it is aborted then, that session must not go on with what it finds.
    """
    engine = make_engine("jamba")
    with ExitStack() as closing:
        sessions = [closing.enter_context(Session()) for _ in range(6)]
        for number, session in enumerate(sessions):
            engine.prefill(session, LONG[number : number + 40])
        expected = [answer(engine, LONG[number : number + 40], 8) for number in range(6)]
        with (
            aborting(engine, 5),
            pytest.raises(RuntimeError, match="aborted"),
        ):
            engine.decode_batch([sessions[0], sessions[5]])
        found: list[list[int]] = []
        for session in sessions:
            if session not in (sessions[0], sessions[5]):
                with pytest.raises(RuntimeError, match="torn"):
                    engine.decode(session)
            found.append(decode(engine, session, 8))
        assert found == expected


def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of tokens of each call."""
    native, rows = L.llama_decode, list[int]()

    def counted(context: L.llama_context_p, batch: L.llama_batch) -> int:
        rows.append(batch.n_tokens)
        return int(native(context, batch))

    monkeypatch.setattr(L, "llama_decode", counted)
    return rows


@pytest.mark.parametrize("kind", [*SLIDING, *STATEFUL])
def test_next_turn_is_fed_only_what_is_new(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn whose answer the client spells in another way feeds tens of tokens, not hundreds."""
    engine = make_engine(kind, chunk=64)
    prompt = LONG + PROMPT
    with Session() as session:
        engine.prefill(session, prompt)
        history = prompt + decode(engine, session, 36)
        rows = fed(monkeypatch)
        turn = [*history[:262], 3, *OTHER]
        reused = engine.prompt(session, turn)
        assert reused >= 239
        assert sum(rows) == len(turn) - 1 - reused < 50
        monkeypatch.undo()
        assert decode(engine, session, 10) == answer(engine, turn, 10)


@pytest.mark.parametrize("kind", [*SLIDING, *STATEFUL])
def test_speculative_decoding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses that are half wrong cost about three tokens for each that is kept, not all of the history."""
    engine = make_engine(kind)
    tokens = answer(engine, LONG, 48)
    with Session() as session:
        engine.prefill(session, LONG)
        rows = fed(monkeypatch)
        for start in range(0, 40, 4):
            right, wrong = tokens[start : start + 3], [1, 2, 3]
            with engine.slots.borrow(session) as state:
                for part in state.chunks(engine.chunk):
                    engine.context.feed([(state.kv_cache, part)])
                    state.advance(len(part))
                state.append(right + wrong)
                engine.context.feed([(state.kv_cache, state.pending)])
                state.advance(7)
                state.rewind(len(LONG) + start + 3, pending=0)
                state.append([tokens[start + 3]])
        monkeypatch.undo()
        assert sum(rows) <= 3 * 40
        assert decode(engine, session, 8) == tokens[40:]


def test_checkpoints_are_few_and_farther_apart_the_older_they_are() -> None:
    """They are bounded in number, counted as memory, and going back far costs more than going back a little."""
    engine = make_engine("jamba", chunk=32)
    context = engine.context
    with Session() as session:
        engine.prefill(session, LONG * 3)
        with engine.slots.borrow(session) as state:
            sequence = state.kv_cache
            points = [point.length for point in sequence.checkpoints]
            assert len(points) == 8
            apart = np.diff(points).tolist()
            assert apart == sorted(apart, reverse=True)
            assert apart[-1] == 32
            assert apart[0] > 64
            held = sum(len(point.state) for point in sequence.checkpoints)
            size = L.llama_state_seq_get_size(context._context, L.llama_seq_id(sequence.id))
            assert context.nbytes(sequence) == held + size > size
            state.rewind(points[-2] + 1)
            assert state.kv_length == points[-2]
            assert [point.length for point in state.kv_cache.checkpoints] == points[:-1]


@pytest.mark.parametrize("kind", [*SLIDING, *STATEFUL])
def test_without_checkpoints(kind: str) -> None:
    """What can't be cut is computed anew."""
    engine = make_engine(kind, checkpoints=0)
    with Session() as session:
        engine.prefill(session, LONG)
        with engine.slots.borrow(session) as state:
            assert not state.kv_cache.checkpoints
            state.rewind(100)
            assert state.kv_length == 0
        assert decode(engine, session, 8) == answer(engine, LONG[:100], 8)


@pytest.mark.parametrize(("refused", "kept"), [(0, 96), (1, 64), (9, 0)])
@pytest.mark.parametrize("kind", [*SLIDING, *STATEFUL])
def test_checkpoint_that_cannot_be_restored(
    kind: str, refused: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If llama.cpp finds no room for one, an older one will do, or none."""
    engine = make_engine(kind, chunk=32)
    native = L.llama_state_seq_set_data_ext
    calls: list[int] = []

    def refuse(
        context: L.llama_context_p,
        state: ctypes.Array[ctypes.c_uint8],
        size: int,
        number: L.llama_seq_id,
        flags: L.llama_state_seq_flags,
    ) -> int:
        calls.append(size)
        return 0 if len(calls) <= refused else int(native(context, state, size, number, flags))

    with Session() as session:
        engine.prefill(session, LONG)
        with monkeypatch.context() as patch, engine.slots.borrow(session) as state:
            patch.setattr(L, "llama_state_seq_set_data_ext", refuse)
            state.rewind(100)
            assert state.kv_length == kept
        assert decode(engine, session, 8) == answer(engine, LONG[:100], 8)


def test_full_kv_cache_tears_nothing() -> None:
    """Where there is no room, nothing is changed, so nothing is taken back to a checkpoint."""
    engine = make_engine("jamba")
    with Session() as session, Session() as other:
        engine.prefill(session, LONG * 6)
        engine.prefill(other, PROMPT)
        before = look(engine, other)
        with pytest.raises(KVCacheFullError):  # noqa: PT012
            while True:
                engine.decode(other)
                before = look(engine, other)
        assert look(engine, other) == before
        session.close()
        engine.decode(other)
        history, _ = look(engine, other)
        assert history[40:] == answer(engine, PROMPT, len(history) - 40)


# Models and what is missing


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
