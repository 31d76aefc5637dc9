"""A conversation in a terminal."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, cast

from rich.console import Console

from inference_session import Session
from numpy_llama import LlamaEngine, Sampler
from smollm2 import ChatTokenizer, Message


if TYPE_CHECKING:
    from io import TextIOWrapper

with suppress(ImportError):  # Not on every platform; where it is, arrow keys edit the line.
    import_module("readline")


def printable(text: str) -> str:
    """Return the text without control characters, and without a last half character."""
    shown = "".join(c for c in text if c.isprintable() or c == "\n")
    return shown.rstrip("\N{REPLACEMENT CHARACTER}")


class Chat:
    """Lets a model answer, and prints the answers as they come."""

    def __init__(
        self,
        engine: LlamaEngine,
        tokenizer: ChatTokenizer,
        console: Console,
        *,
        max_tokens: int,
        sample: Sampler,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._console = console
        self._max_tokens = max_tokens
        self._sample = sample

    def answer(self, text: str) -> None:
        """Print the answer to one text; `ValueError` if it is too long."""
        messages: list[Message] = [("user", text)]
        tokens = self._encode(messages)
        with Session() as session:
            self._engine.prompt(session, tokens)
            self._stream(session, [])

    def converse(self) -> None:
        """Answer what is typed, until the end of the input."""
        messages: list[Message] = []
        # A line that isn't text is refused by itself: others may have been read together with it.
        cast("TextIOWrapper", sys.stdin).reconfigure(errors="surrogateescape")
        with Session() as session:
            self._note(f"Session {session.id}. Ctrl-C stops an answer, Ctrl-D ends.")
            while True:
                try:
                    text = self._console.input("[bold cyan]you>[/] ")
                    text.encode()  # Bytes that are no text are lone surrogates, which fail.
                    if text.strip():
                        self._turn(session, messages, text)
                except UnicodeError:
                    self._note("That was not valid text.")
                except KeyboardInterrupt:  # There is no answer to stop, or no longer.
                    self._console.print()
                except EOFError:
                    self._console.print()
                    return

    def _turn(self, session: Session, messages: list[Message], text: str) -> None:
        """Answer a text, and add both to the messages."""
        taken: list[int] = []
        start = time.perf_counter()
        reused = 0
        messages.append(("user", text))
        try:
            tokens = self._encode(messages)
            reused = self._engine.prompt(session, tokens)
            self._stream(session, taken)
        except ValueError as error:
            self._note(f"Not sent: {error}.")
        except KeyboardInterrupt:
            # The step under way was rolled back. The session has exactly the tokens printed, and
            # the next turn goes on from there.
            self._console.print()
        if not taken:
            messages.pop()
            return
        messages.append(("assistant", self._tokenizer.decode(taken)))
        seconds = time.perf_counter() - start
        self._note(f"{len(taken)} tokens, {reused} reused, {seconds:.1f} s")

    def _encode(self, messages: list[Message]) -> list[int]:
        """Return the tokens of a conversation; drop the oldest messages if it is too long."""
        room = self._engine.model.config.context_length - self._max_tokens
        while len(tokens := self._tokenizer.encode_chat(messages)) > room:
            if len(messages) == 1:
                msg = f"{len(tokens):,} tokens are too many, there is room for {room:,}"
                raise ValueError(msg)
            del messages[:2]
        return tokens

    def _stream(self, session: Session, taken: list[int]) -> None:
        """Print an answer, and put its tokens into `taken` as they come."""
        shown = 0
        stop = {self._tokenizer.end_of_turn}
        for token in self._engine.stream(session, self._max_tokens, sample=self._sample, stop=stop):
            taken.append(token)
            text = printable(self._tokenizer.decode(taken))
            sys.stdout.write(text[shown:])
            sys.stdout.flush()
            shown = len(text)
        sys.stdout.write("\n")

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False)
