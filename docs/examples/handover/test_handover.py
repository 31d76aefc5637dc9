"""A handover: a conversation goes from one process to another, and nobody can tell but by the time it takes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from pathlib import Path

import pytest

from engine_process import EngineProcess
from handover import Pair, compute_anew, decode, prefill, smollm2_engine
from inference_session import Session
from llama_model import random_model
from numpy_llama import LlamaEngine


PROGRAM = str(Path(__file__).with_name("handover.py"))
PROMPT = list(range(1, 101))
make_engine = partial(LlamaEngine, random_model(1))


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """Give two processes with the same model, and check that they hold no KV caches in the end."""
    with EngineProcess(make_engine) as prefiller, EngineProcess(make_engine) as decoder:
        yield Pair(prefiller, decoder, tmp_path)
        assert decoder.call(attrgetter("memory.used")) == 0


def test_conversation_goes_over(pair: Pair) -> None:
    """It has its id there, feeds one token, and gets the answer of a conversation that never moved."""
    moved, there, undisturbed = pair.answer(PROMPT, 10)
    assert there.id == moved.id != undisturbed.id
    assert (there.fed, undisturbed.fed) == (1, len(PROMPT))
    assert there.tokens == undisturbed.tokens
    assert len(there.tokens) == 10
    assert pair.right
    assert not list(pair.folder.iterdir())
    assert pair.prefiller.call(attrgetter("memory.used")) == 0


def test_wrong_answer_is_noticed(pair: Pair) -> None:
    """With another model in one of the two processes, the program doesn't say that all is right."""
    with EngineProcess(partial(LlamaEngine, random_model(2))) as other:
        mixed = Pair(other, pair.decoder, pair.folder)
        mixed.answer(PROMPT, 10)
        assert not mixed.right


def test_killed_after_it_has_saved(pair: Pair) -> None:
    """A conversation that is on its way needs nobody who is alive."""
    moved = pair.prefiller.call(prefill, PROMPT, pair.folder)
    pair.prefiller.kill()
    there = pair.decoder.call(decode, moved.path, 10)
    assert there.tokens == pair.decoder.call(compute_anew, PROMPT, 10).tokens


def test_one_process_gets_it(pair: Pair) -> None:
    """A conversation that was taken isn't there for anybody else."""
    moved = pair.prefiller.call(prefill, PROMPT, pair.folder)
    pair.decoder.call(decode, moved.path, 1)
    with pytest.raises(FileNotFoundError):
        pair.prefiller.call(decode, moved.path, 1)


def test_moving_is_cheap(tmp_path: Path) -> None:
    """Of 1,024 tokens, restoring and the first token take a fifth of the time of a prefill and the first token."""
    engine = smollm2_engine()
    prompt = [token % 1000 for token in range(1024)]
    with Session() as session:
        engine.prefill(session, prompt)
        engine.slots.save(session, tmp_path / "session")

    def restored() -> None:
        with engine.slots.restore(tmp_path / "session") as session:
            engine.decode(session)

    def computed() -> None:
        with Session() as session:
            engine.prefill(session, prompt)
            engine.decode(session)

    assert fastest(restored, rounds=5) <= fastest(computed, rounds=2) / 5


def fastest(work: Callable[[], None], rounds: int) -> float:
    """Return the CPU seconds of the best round."""
    seconds: list[float] = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def test_program() -> None:
    """The program answers a question in two processes, and measures how long that takes."""
    run = subprocess.run(
        [sys.executable, PROGRAM, "--lengths", "100", "200"],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "and fed 1 token:" in run.stdout
    assert "sky appears blue" in run.stdout
    assert "exactly as undisturbed" in run.stdout
    assert run.stdout.count("times as long") == 2


@pytest.mark.parametrize("length", ["1", "8001", "many"])
def test_wrong_arguments(length: str) -> None:
    """A wrong length is named in a line, and the exit code is that of wrong usage."""
    run = subprocess.run(
        [sys.executable, PROGRAM, "--lengths", length],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert run.returncode == 2
    assert "argument --lengths" in run.stderr
