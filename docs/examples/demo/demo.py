"""Chat with a small model on the CPU, or take a tour of the promises of its sessions.

Without arguments, take the tour. It checks all its claims while it runs; if any is false, it says
so, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn


if TYPE_CHECKING:
    from io import TextIOWrapper

    from llama_model import Llama
    from smollm2 import ChatTokenizer


FAILED = 1
INTERRUPTED = 130
ANSWER_TOKENS = 400
TOUR_TOKENS = 40
TOUR_NEEDS = 12


def main() -> int:
    """Run the program and return its exit code."""
    parser = make_parser()
    arguments = parser.parse_args()
    prompt: str | None = arguments.prompt
    is_tour = prompt is None and not arguments.chat
    max_tokens = arguments.max_tokens or (TOUR_TOKENS if is_tour else ANSWER_TOKENS)
    if is_tour and max_tokens < TOUR_NEEDS:
        parser.error(f"argument --max-tokens: the tour needs {TOUR_NEEDS} at least")

    # NumPy's library for matrix products reads this once, when NumPy is imported.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(arguments.threads)
    os.environ["VECLIB_MAXIMUM_THREADS"] = str(arguments.threads)
    from chat import Chat  # noqa: PLC0415
    from numpy_llama import LlamaEngine, Sampler, greedy, sampling  # noqa: PLC0415
    from tour import Tour, smollm2_engine  # noqa: PLC0415

    # Not every terminal can show every character.
    cast("TextIOWrapper", sys.stdout).reconfigure(errors="replace")
    # One answer may go into a file or a pipe: nothing else goes there.
    console = Console(stderr=prompt is not None, highlight=False)
    start = time.perf_counter()
    try:
        model, tokenizer = load(console)
    except FileNotFoundError as error:
        console.print(f"demo.py: {error}", markup=False, soft_wrap=True)
        return FAILED
    load_seconds = time.perf_counter() - start
    engine = LlamaEngine(model)
    sample: Sampler = greedy
    if arguments.temperature > 0:
        sample = sampling(temperature=arguments.temperature, top_p=0.95, seed=arguments.seed)
    if max_tokens > model.config.context_length // 2:
        parser.error(
            f"argument --max-tokens: {model.config.context_length // 2} at most, "
            "half of what the model can read"
        )
    if is_tour:
        tour = Tour(
            engine,
            tokenizer,
            console,
            max_tokens=max_tokens,
            sample=sample,
            make_engine=smollm2_engine,
        )
        return FAILED if tour.run(load_seconds, arguments.threads) else 0
    chat = Chat(engine, tokenizer, console, max_tokens=max_tokens, sample=sample)
    if prompt is None:
        chat.converse()
        return 0
    try:
        chat.answer(prompt)
    except ValueError as error:
        parser.error(f"argument --prompt: {error}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return a parser for the command line."""
    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__, allow_abbrev=False)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--prompt", type=prompt_text, metavar="TEXT", help="print one answer")
    mode.add_argument("--chat", action="store_true", help="have a conversation")
    parser.add_argument(
        "--max-tokens",
        type=whole_number(least=1),
        metavar="N",
        help=f"tokens in an answer, at most (default: {ANSWER_TOKENS}, in the tour {TOUR_TOKENS})",
    )
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="T",
        help="0 is the likeliest answer, 0.7 a livelier one (default: 0)",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(least=0),
        default=0,
        metavar="N",
        help="for another answer, at a temperature above 0 (default: 0)",
    )
    parser.add_argument(
        "--threads",
        type=whole_number(least=1),
        default=idle_cores(),
        metavar="N",
        help="threads to compute with (default: the number of idle cores, now %(default)s)",
    )
    return parser


def prompt_text(text: str) -> str:
    """Check a text to be answered."""
    if not text.strip():
        raise argparse.ArgumentTypeError("there is nothing to answer, the text is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("the text is not valid UTF-8") from None
    return text


def whole_number(*, least: int) -> Callable[[str], int]:
    """Return a function that reads a whole number of at least `least`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, but it is {number}")
        return number

    return read


def temperature(text: str) -> float:
    """Read a temperature."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be 0 or more, but it is {text}")
    return number


def idle_cores() -> int:
    """Return how many threads to compute with, 4 at most.

    Threads sharing a product wait for the slowest one: if that has to wait for a core, everything
    is many times slower than on a single thread.
    """
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0  # Not on Windows.
    return min(max(cores - round(load), 1), 4)


def load(console: Console) -> tuple[Llama, ChatTokenizer]:
    """Load the model, and show how far it is."""
    import smollm2  # noqa: PLC0415

    path = smollm2.find_weights()
    if not console.is_terminal:
        return smollm2.load(path)
    columns = (TextColumn("Loading SmolLM2-135M"), BarColumn(None), TaskProgressColumn())
    with Progress(*columns, console=console, transient=True, expand=True) as progress:
        task = progress.add_task("", total=None)  # The total is in the head of the file.
        return smollm2.load(
            path, lambda done, total: progress.update(task, completed=done, total=total)
        )


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader of the output is gone, and the interpreter must not try to flush it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    sys.exit(code)
