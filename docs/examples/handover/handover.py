"""Prefill in one process, decode in another: conversations go over with their KV caches.

Every answer is computed twice, by a conversation that went over and by one that did not; if they
differ, or more than one token was fed before the first one came, the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID


# NumPy reads it once, in every process.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from engine_process import EngineProcess
from inference_session import Session
from numpy_llama import LlamaEngine
from smollm2 import ChatTokenizer, find_weights, load, load_tokenizer


QUESTION = "Why is the sky blue?"
TOKENS = 40
TEXT = (
    "The lighthouse stood where the river meets the sea, and its keeper lit the lamp each evening. "
)
LENGTHS = (128, 512, 1024, 2048)
MOST_TOKENS = 8000


def smollm2_engine() -> LlamaEngine:
    """Make an engine, in a process of its own."""
    return LlamaEngine(load(find_weights())[0])


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A conversation on its way."""

    path: Path
    id: UUID
    nbytes: int
    """The size of the file."""
    seconds: float
    """The time that it took to save it."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer, and how long its first token took."""

    id: UUID
    tokens: Sequence[int]
    fed: int
    """How many tokens went through the model before the first one of the answer came."""
    seconds: float


def prefill(engine: LlamaEngine, prompt: Sequence[int], folder: Path) -> Moved:
    """Compute the KV cache of a prompt, and send the conversation on its way."""
    session = Session()
    engine.prefill(session, prompt)
    path = folder / f"{session.id}.session"
    start = time.perf_counter()
    engine.slots.save(session, path, move=True)
    seconds = time.perf_counter() - start
    return Moved(path=path, id=session.id, nbytes=path.stat().st_size, seconds=seconds)


def decode(engine: LlamaEngine, path: Path, count: int) -> Answer:
    """Take a conversation, and answer it."""
    start = time.perf_counter()
    with engine.slots.restore(path, take=True) as session:
        return answer(engine, session, lambda history: history, count, start)


def compute_anew(engine: LlamaEngine, prompt: Sequence[int], count: int) -> Answer:
    """Answer a conversation that was never anywhere else."""
    start = time.perf_counter()
    with Session() as session:
        return answer(engine, session, lambda history: prompt, count, start)


def answer(
    engine: LlamaEngine,
    session: Session,
    prompt: Callable[[Sequence[int]], Sequence[int]],
    count: int,
    start: float,
) -> Answer:
    """Return an answer of so many tokens, to what a function makes of the history."""
    tokens: list[int] = []
    fed, seconds = 0, 0.0
    for step in engine.answer(session, prompt, count):
        if not tokens:
            fed += step.fed
            seconds = time.perf_counter() - start
        if step.token is not None:
            tokens.append(step.token)
    return Answer(id=session.id, tokens=tokens, fed=fed, seconds=seconds)


def main() -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(prog="handover.py", description=__doc__)
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=LENGTHS,
        metavar="N",
        help="the lengths of the prompts that are measured, in tokens (default: %(default)s)",
    )
    lengths: Sequence[int] = parser.parse_args().lengths
    if not all(2 <= length <= MOST_TOKENS for length in lengths):
        parser.error(f"argument --lengths: from 2 to {MOST_TOKENS}")
    tokenizer = load_tokenizer(find_weights())
    with (
        EngineProcess(smollm2_engine) as prefiller,
        EngineProcess(smollm2_engine) as decoder,
        TemporaryDirectory() as folder,
    ):
        pair = Pair(prefiller, decoder, Path(folder))
        show_conversation(pair, tokenizer)
        show_times(pair, tokenizer, lengths)
    return 0 if pair.right else 1


class Pair:
    """Two processes: one for prompts, one for answers."""

    def __init__(self, prefiller: EngineProcess, decoder: EngineProcess, folder: Path) -> None:
        self.prefiller = prefiller
        self.decoder = decoder
        self.folder = folder
        self.right = True
        """Whether all answers were."""

    def answer(self, prompt: Sequence[int], count: int) -> tuple[Moved, Answer, Answer]:
        """Answer a prompt, both by a conversation that goes over and by one that does not."""
        moved = self.prefiller.call(prefill, prompt, self.folder)
        there = self.decoder.call(decode, moved.path, count)
        undisturbed = self.decoder.call(compute_anew, prompt, count)
        self.right &= (there.id, there.fed) == (moved.id, 1)
        self.right &= there.tokens == undisturbed.tokens
        self.right &= not any(self.folder.iterdir())
        return moved, there, undisturbed


def show_conversation(pair: Pair, tokenizer: ChatTokenizer) -> None:
    """Answer a question in two processes."""
    prompt = tokenizer.encode_chat([("user", QUESTION)])
    moved, there, undisturbed = pair.answer(prompt, TOKENS)
    same = "exactly as" if there.tokens == undisturbed.tokens else "NOT AS"
    print(f"{QUESTION} ({len(prompt)} tokens)")
    print(f"  process {pair.prefiller.pid} computed it, and saved session {moved.id}")
    print(f"  process {pair.decoder.pid} took    session {there.id}, and fed {there.fed} token:")
    print(f"  {tokenizer.decode(there.tokens)!r}, {same} undisturbed")


def show_times(pair: Pair, tokenizer: ChatTokenizer, lengths: Sequence[int]) -> None:
    """Print how long the first token of an answer takes."""
    text = tokenizer.encode(TEXT)
    print("\nUntil the first token of the answer:")
    print("  prompt     file  saved in  taken and answered in  computed anew in")
    for length in lengths:
        prompt = (text * (length // len(text) + 1))[:length]
        moved, there, anew = pair.answer(prompt, 1)
        print(
            f"  {length:6} {moved.nbytes / 1e6:5.1f} MB {moved.seconds * 1e3:6.0f} ms "
            f"{there.seconds * 1e3:19.0f} ms {anew.seconds * 1e3:14.0f} ms, "
            f"{anew.seconds / there.seconds:.0f} times as long"
        )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
