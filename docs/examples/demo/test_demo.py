"""The demo: what it says is checked, and it can be told what to do and stopped."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import cast

import pytest
from rich.console import Console
from tests.terminal import CTRL_C, CTRL_D, needs_terminal, nox_command, terminal

from inference_session import Session
from inference_session.engine import DecodeResult
from llama_model import random_model
from numpy_llama import LlamaEngine, Sampler, greedy, sampling
from smollm2 import ChatTokenizer, Message
from tour import Tour


DEMO = str(Path(__file__).with_name("demo.py"))
CLAIMS = 19
MODEL = random_model(2, num_layers=14, context_length=2000)


def demo(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run the demo as a user would, but for the terminal."""
    return subprocess.run(
        [sys.executable, DEMO, *arguments],
        input=text,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        check=False,
    )


class Letters:
    """A tokenizer for a random model: a letter is a token."""

    end_of_turn = 0

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the letters of a conversation."""
        turns = "".join(f"{role}:{text}\0" for role, text in messages)
        return [ord(letter) for letter in f"{turns}assistant:"]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the letters of tokens, but for the end of a turn."""
        return "".join(map(chr, tokens)).rstrip("\0")


def tour(engine: LlamaEngine, sample: Sampler = greedy) -> tuple[int, str]:
    """Take the tour with another model; return how many claims were false, and what it printed."""
    output = io.StringIO()
    console = Console(file=output, width=80)
    tokenizer = cast("ChatTokenizer", Letters())
    guide = Tour(
        engine,
        tokenizer,
        console,
        max_tokens=20,
        sample=sample,
        make_engine=partial(LlamaEngine, MODEL),
    )
    return guide.run(load_seconds=0, threads=1), output.getvalue()


@pytest.mark.parametrize("sample", [greedy, sampling(seed=3)], ids=["greedy", "sampling"])
def test_tour_with_a_random_model(sample: Sampler) -> None:
    """Nothing that the tour claims depends on what the model says."""
    engine = LlamaEngine(MODEL)
    false, output = tour(engine, sample)
    assert false == 0
    assert f"All {CLAIMS} claims checked are true." in output
    assert engine.memory.used == 0


def test_tour_finds_out() -> None:
    """An engine that mixes up its sessions is told so, claim by claim."""

    class MixedUp(LlamaEngine):
        def decode_batch(
            self, sessions: Sequence[Session], /, *, sample: Sampler = greedy
        ) -> list[DecodeResult]:
            return super().decode_batch(sessions, sample=sample)[::-1]

    false, output = tour(MixedUp(MODEL))
    assert false >= 2
    assert f"{false} of {CLAIMS} claims are false:" in output
    assert output.count("each says what it says alone") == 2


def test_tour() -> None:
    """The tour with the real model ends well, and puts no control codes into a log."""
    run = demo("--max-tokens", "12")
    assert run.returncode == 0, run.stderr
    assert f"All {CLAIMS} claims checked are true." in run.stdout
    assert "The capital of France is Paris." in run.stdout
    assert "\x1b" not in run.stdout
    assert run.stderr == ""


def test_prompt() -> None:
    """One answer is all there is on standard output."""
    run = demo("--prompt", "What is the capital of France?")
    assert (run.returncode, run.stdout) == (0, "The capital of France is Paris.\n")


def test_chat() -> None:
    """A conversation knows what was said before, and ends with the input."""
    run = demo("--chat", text="What is the capital of France?\n\nAnd of Italy?\n")
    assert run.returncode == 0
    assert "The capital of France is Paris." in run.stdout
    assert "The capital of Italy is Rome." in run.stdout
    assert "44 reused" in run.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="no signals there")
def test_chat_is_interrupted() -> None:
    """Ctrl-C stops an answer, not the conversation."""
    with subprocess.Popen(
        [sys.executable, "-u", DEMO, "--chat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    ) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write("Tell me a long story.\n")
        chat.stdin.flush()
        seen = ""
        while "you> " not in seen:
            seen += chat.stdout.read(1)
        seen = chat.stdout.read(20)
        chat.send_signal(signal.SIGINT)
        chat.stdin.write("What is the capital of France?\n")
        chat.stdin.close()
        rest = chat.stdout.read()
    assert chat.returncode == 0
    assert seen.strip()
    assert "The capital of France is Paris." in rest


@needs_terminal
def test_chat_in_a_terminal(tmp_path: Path) -> None:
    """Under nox, too, Ctrl-C stops an answer and nothing else, and Ctrl-D gives the terminal back as it was."""
    with terminal(nox_command("demo", "--chat", directory=tmp_path)) as chat:
        chat.wait_for_prompt("you>")
        chat.type("Tell me a long story.\n")
        chat.wait_for(r"\n(\S+ ){5}")
        chat.type(CTRL_C)
        chat.wait_for("tokens, 0 reused")
        chat.wait_for_prompt("you>")
        chat.press_until(CTRL_C, "you>")
        chat.wait_for_prompt("")
        chat.type("What is the capital of France?\n")
        chat.wait_for("Paris")
        chat.wait_for_prompt("you>")
        chat.type(CTRL_D)
        assert chat.wait() == 0
        assert chat.shows_what_is_typed()


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_chat_with_what_is_not_text(errors: str) -> None:
    """A line with an invalid byte is refused, and those around it are answered."""
    run = subprocess.run(
        [sys.executable, DEMO, "--chat"],
        input=b"What is the capital of France?\nAnd of \xff?\nAnd of Italy?\n",
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": f"utf-8:{errors}"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    output = run.stdout.decode()
    before, refusal, after = output.partition("That was not valid text.")
    assert "The capital of France is Paris." in before
    assert refusal
    assert "The capital of Italy is Rome." in after


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", " "], "the text is empty"),
        (["--prompt", "\udcff"], "not valid UTF-8"),
        (["--prompt", "Hi", "--chat"], "not allowed with"),
        (["--max-tokens", "0"], "must be 1 or more"),
        (["--max-tokens", "-3"], "must be 1 or more"),
        (["--max-tokens", "many"], "'many' is not a whole number"),
        (["--max-tokens", "5"], "the tour needs 12"),
        (["--threads", "0"], "must be 1 or more"),
        (["--temperature", "-1"], "must be 0 or more"),
        (["--temperature", "nan"], "must be 0 or more"),
        (["--temperature", "hot"], "'hot' is not a number"),
        (["--seed", "-1"], "must be 0 or more"),
        (["--unknown"], "unrecognized arguments"),
        (["word"], "unrecognized arguments"),
        (["--prompt", "word " * 9000], "tokens are too many"),
        (["--prompt", "Hi", "--max-tokens", "5000"], "4096 at most"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    """A wrong argument is named in a line, and the exit code is that of wrong usage."""
    run = demo(*arguments)
    assert run.returncode == 2
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""


def test_help() -> None:
    """The options can be looked up, in no time."""
    run = demo("--help")
    assert run.returncode == 0
    assert "--max-tokens" in run.stdout
