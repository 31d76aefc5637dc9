"""A tour of a session's promises, each shown on a real model and checked."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

from rich import box
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from chat import printable
from engine_process import EngineProcess
from inference_session import Session
from numpy_llama import LlamaEngine, Sampler
from smollm2 import ChatTokenizer, Message, find_weights, load


QUESTIONS = (
    "Why is the sky blue?",
    "What is the capital of France?",
    "What do bees make?",
    "Write a haiku about the sea.",
)
SHORTER = "And in one short sentence?"
SIMPLER = "Say that to a child of five."
STORY = (
    "Go on with this story. The lighthouse stood where the river meets the sea. Its keeper lit "
    "the lamp each evening and wrote down the name of every ship that passed. In a winter of "
    "great storms the lamp went out three times, and three times she climbed the stairs in the "
    "dark to light it again. When spring came, a captain brought her a small brass bell, and told "
    "her that his crew was alive because of her. She hung it over the door, and it rings to this "
    "day whenever the wind comes from the north."
)
TAKEN_BEFORE_LEAVING = 8
COLUMN_WIDTH = 28
SECONDS_BETWEEN_FRAMES = 0.08


class Talk:
    """A conversation as its client sees it: a session, and its messages."""

    def __init__(self, title: str = "") -> None:
        self.session = Session()
        self.messages: list[Message] = []
        self.answer: list[int] = []
        """Tokens of the present answer; at its end, it moves to `messages`."""
        self.title = title or f"session {str(self.session.id)[:8]}"


class Tour:
    """Shows the promises of sessions, and counts broken ones."""

    def __init__(
        self,
        engine: LlamaEngine,
        tokenizer: ChatTokenizer,
        console: Console,
        *,
        max_tokens: int,
        sample: Sampler,
        make_engine: Callable[[], LlamaEngine],
    ) -> None:
        """Show an engine; `make_engine` makes another one of the same model, in another process."""
        self._engine = engine
        self._make_engine = make_engine
        self._tokenizer = tokenizer
        self._console = console
        self._max_tokens = max_tokens
        self._sample = sample
        self._headings = 0
        self._claims = 0
        self._false: list[str] = []
        self._measured: list[tuple[str, str]] = []

    def run(self, load_seconds: float, threads: int) -> int:
        """Show everything; return the number of false claims."""
        self._console.print(
            "[bold]SmolLM2-135M-Instruct[/], a chat model of 135 million parameters, "
            f"computed by NumPy on {threads} thread{'s' * (threads > 1)}."
        )
        self._measured.append(("weights", f"loaded in {load_seconds:.1f} s"))
        talks = self._many_at_once()
        self._second_turn(talks[0])
        self._client_goes_away(talks[2])
        self._out_of_memory([talks[1], talks[3]], idle=[talks[0], talks[2]])
        self._evicted(talks[0])
        self._killed(talks[1])
        self._no_copy(talks[0])
        self._measure_speed()
        self._close(talks)
        self._sum_up()
        return len(self._false)

    # The parts of the tour

    def _many_at_once(self) -> list[Talk]:
        self._heading("Four conversations at once, one pass over the weights for all")
        talks = [Talk() for _ in QUESTIONS]
        prompts = [
            self._ask(talk, question) for talk, question in zip(talks, QUESTIONS, strict=True)
        ]
        with self._shown(talks) as show:
            for talk, tokens in zip(talks, prompts, strict=True):
                self._engine.prefill(talk.session, tokens)
            self._finish(talks, show)
        twins = [self._twin(talk) for talk in talks]
        self._claim("each says what it says alone, token by token", _same(talks, twins))
        self._end_turn(talks)
        return talks

    def _second_turn(self, talk: Talk) -> None:
        self._heading("A second turn computes only what is new")
        tokens = self._ask(talk, SHORTER)
        shared = _common_prefix(self._history(talk), tokens)
        known = talk.session.token_count - 1  # The last token is yet to be fed to the model.
        with stopwatch() as reusing:
            reused = self._engine.prompt(talk.session, tokens)
        fresh = Talk("a fresh session")
        fresh.messages = talk.messages
        with stopwatch() as computing:
            self._engine.prefill(fresh.session, tokens)
        self._say(
            f"{reused} of {len(tokens)} tokens are in the KV cache already. The others take "
            f"{reusing():.0f} ms; a fresh session, which has none, takes {computing():.0f} ms."
        )
        self._answer([talk, fresh])
        self._claim("all that both turns share is reused", reused == min(shared, known))
        self._claim("both say the same, token by token", talk.answer == fresh.answer)
        self._end_turn([talk])
        fresh.session.close()
        saved = computing() - reusing()
        self._measured.append(
            ("second turn", f"{reused} of {len(tokens)} tokens reused, {saved:.0f} ms saved")
        )

    def _client_goes_away(self, talk: Talk) -> None:
        self._heading("A client goes away in mid-answer")
        tokens = self._ask(talk, SIMPLER)
        self._engine.prompt(talk.session, tokens)
        stream = self._engine.stream(
            talk.session,
            self._max_tokens,
            sample=self._sample,
            stop={self._tokenizer.end_of_turn},
        )
        with self._shown([talk]) as show:
            for token in stream:
                talk.answer.append(token)
                show()
                if len(talk.answer) == TAKEN_BEFORE_LEAVING:
                    break
        stream.close()
        self._claim(
            f"the history has the {len(talk.answer)} tokens it was sent, and no other",
            self._history(talk) == tokens + talk.answer,
        )
        self._say("It comes back, and wants the rest.")
        self._answer([talk])
        self._claim("the whole is what it would have been", _same([talk], [self._twin(talk)]))
        self._end_turn([talk])

    def _out_of_memory(self, talks: list[Talk], idle: list[Talk]) -> None:
        self._heading("Out of memory, in the middle of the model")
        first, second = talks
        memory = self._engine.memory
        self._engine.prompt(second.session, self._ask(second, SIMPLER))
        self._fill_up(first)
        with self._engine.slots.borrow(first.session) as state:
            layer_bytes = state.kv_cache.layers[0].nbytes
        # A full cache doubles, layer by layer. Leave room for twelve of its layers.
        memory.limit = memory.used + 13 * layer_bytes
        before: list[list[int]] = []
        failure = ""
        with self._shown(talks) as show:
            while not failure and not self._is_over(first):
                before = [self._history(talk) for talk in talks]
                try:
                    self._step([talk for talk in talks if not self._is_over(talk)])
                except MemoryError as error:
                    failure = str(error)
                show()
        self._say(f"MemoryError: {failure}", style="red")
        self._claim("the step failed half-way, after 12 layers", "layer 13 " in failure)
        self._claim(
            "both histories are what they were before the step",
            before == [self._history(talk) for talk in talks],
        )
        for talk in idle:
            self._engine.slots.evict(talk.session)
        freed = memory.limit - memory.used
        self._say(f"Evicting two idle conversations makes room ({freed / 1e6:.0f} MB). Again:")
        self._answer(talks)
        memory.limit = None
        twins = [self._twin(talk) for talk in talks]
        self._claim("both say what they would have said, token by token", _same(talks, twins))
        self._end_turn(talks)
        self._measured.append(("failed step", f"rolled back from {failure.partition(':')[0]}"))

    def _evicted(self, talk: Talk) -> None:
        self._heading("An evicted conversation goes on")
        tokens = self._ask(talk, SIMPLER)
        with stopwatch() as computing:
            reused = self._engine.prompt(talk.session, tokens)
        self._claim(
            f"its cache was gone: {len(tokens) - reused} of {len(tokens)} tokens computed anew",
            reused == 0,
        )
        self._answer([talk])
        self._claim("it says what it would have said", _same([talk], [self._twin(talk)]))
        self._end_turn([talk])
        self._measured.append(
            ("evicted cache", f"{len(tokens)} tokens computed anew in {computing():.0f} ms")
        )

    def _killed(self, talk: Talk) -> None:
        self._heading("A conversation outlives its process")
        tokens = self._ask(talk, SIMPLER)
        session_id = talk.session.id
        with TemporaryDirectory() as folder, EngineProcess(self._make_engine) as other:
            path = Path(folder, "session")
            self._engine.slots.save(talk.session, path, move=True)
            with self._waiting("Another process loads the model, and takes the conversation"):
                talk.answer = other.call(
                    answer_elsewhere,
                    path,
                    tokens,
                    TAKEN_BEFORE_LEAVING,
                    sample=self._sample,
                    stop={self._tokenizer.end_of_turn},
                )
            other.kill()
            self._say(
                f"Process {other.pid} took it, saved it after {len(talk.answer)} tokens, and was "
                "killed. It goes on here:"
            )
            size = path.stat().st_size
            with stopwatch() as restoring:
                talk.session = self._engine.slots.restore(path, take=True)
        with self._engine.slots.borrow(talk.session) as state:
            pending = len(state.pending)
        self._claim("it has the id that it had", talk.session.id == session_id)
        self._claim("its KV cache is there, but for the last token", pending == 1)
        self._answer([talk])
        self._claim("the whole is what it would have been", _same([talk], [self._twin(talk)]))
        self._end_turn([talk])
        self._measured.append(
            ("restored session", f"{size / 1e6:.0f} MB read in {restoring():.0f} ms")
        )

    def _no_copy(self, talk: Talk) -> None:
        self._heading("A session is never copied")
        attempts: dict[str, Callable[[Session], object]] = {
            "copy.copy(session)": copy.copy,
            "copy.deepcopy(session)": copy.deepcopy,
            "pickle.dumps(session)": pickle.dumps,
        }
        before = self._history(talk)
        for call, attempt in attempts.items():
            refusal = ""
            try:
                attempt(talk.session)
            except TypeError as error:
                refusal = f"TypeError: {error}"
            if call == "copy.deepcopy(session)":
                self._say(refusal, style="red")
            self._claim(f"{call} is refused", bool(refusal))
        self._claim("it is as it was", self._history(talk) == before)

    def _measure_speed(self) -> None:
        self._heading("How fast is it?")
        sessions = [Session() for _ in range(9)]
        tokens = self._tokenizer.encode_chat([("user", QUESTIONS[0])])
        for session in sessions:
            self._engine.prefill(session, tokens)
        one = eight = borrow = float("inf")
        for _ in range(12):
            with stopwatch() as elapsed:
                self._engine.decode(sessions[0])
            one = min(one, elapsed())
            with stopwatch() as elapsed:
                self._engine.decode_batch(sessions[1:])
            eight = min(eight, elapsed())
            with stopwatch() as elapsed:
                for _ in range(100):
                    with self._engine.slots.borrow(sessions[0]):
                        pass
            borrow = min(borrow, elapsed() / 100)
        for session in sessions:
            session.close()
        self._say(
            f"A token of one session takes {one:.0f} ms; a token of each of 8 sessions, in a batch, "
            f"{eight:.0f} ms for all: {eight / one:.1f} times as long."
        )
        self._measured += [
            ("one session", f"{one:.1f} ms a token"),
            (
                "batch of 8",
                f"{eight:.1f} ms for 8 tokens, {eight / one:.1f} times as long as one",
            ),
            ("one borrow", f"{borrow * 1000:.1f} µs, {borrow / one:.3%} of a token"),
        ]

    def _close(self, talks: Sequence[Talk]) -> None:
        self._heading("All is closed, nothing is leaked")
        memory = self._engine.memory
        held = memory.used
        for talk in talks:
            talk.session.close()
        self._claim(
            f"{memory.created} KV caches created, {memory.released} released",
            memory.created == memory.released,
        )
        self._claim(
            f"{held / 1e6:.0f} MB held before, {memory.used} bytes now", memory.used == 0 < held
        )
        caches = f"{memory.created} created, {memory.released} released"
        self._measured.append(("KV caches", caches))

    def _sum_up(self) -> None:
        table = Table(box=box.ROUNDED, title="Measured", title_style="bold", show_header=False)
        for name, value in self._measured:
            table.add_row(Text(name, "cyan"), value)
        self._console.print()
        self._console.print(table)
        if self._false:
            self._console.print(
                f"{len(self._false)} of {self._claims} claims are false:", style="bold red"
            )
            for claim in self._false:
                self._console.print(f"  {claim}", style="red", markup=False)
        else:
            self._console.print(f"All {self._claims} claims checked are true.", style="bold green")

    # The client

    def _ask(self, talk: Talk, question: str) -> list[int]:
        """Add a question to a conversation and return all of its tokens."""
        talk.messages.append(("user", question))
        talk.answer = []
        return self._tokenizer.encode_chat(talk.messages)

    def _end_turn(self, talks: Sequence[Talk]) -> None:
        for talk in talks:
            talk.messages.append(("assistant", self._tokenizer.decode(talk.answer)))

    def _answer(self, talks: Sequence[Talk]) -> None:
        """Show the answers of conversations in a batch, or the rest of them."""
        with self._shown(talks) as show:
            self._finish(talks, show)

    def _finish(self, talks: Sequence[Talk], show: Callable[[], None]) -> None:
        while running := [talk for talk in talks if not self._is_over(talk)]:
            self._step(running)
            show()

    def _step(self, talks: Sequence[Talk]) -> None:
        results = self._engine.decode_batch([talk.session for talk in talks], sample=self._sample)
        for talk, result in zip(talks, results, strict=True):
            talk.answer.append(result.token)

    def _is_over(self, talk: Talk) -> bool:
        return len(talk.answer) >= self._max_tokens or talk.answer[-1:] == [
            self._tokenizer.end_of_turn
        ]

    def _twin(self, talk: Talk) -> Talk:
        """Return the same conversation in an undisturbed session of its own."""
        twin = Talk()
        with twin.session, self._waiting("The same again, each alone and undisturbed, to compare"):
            self._engine.prefill(twin.session, self._tokenizer.encode_chat(talk.messages))
            while not self._is_over(twin):
                result = self._engine.decode(twin.session, sample=self._sample)
                twin.answer.append(result.token)
        return twin

    def _fill_up(self, talk: Talk) -> None:
        """Ask a question so long that the present KV cache has room for only three more tokens."""
        with self._engine.slots.borrow(talk.session) as state:
            capacity = state.kv_cache.layers[0].shape[2]
        text = ""
        for word in cycle(STORY.split()):
            longer = f"{text} {word}".strip()
            count = len(self._tokenizer.encode_chat([*talk.messages, ("user", longer)]))
            if not text and count > capacity - 3:
                capacity *= 2
            if count > capacity - 3:
                break
            text = longer
        self._engine.prompt(talk.session, self._ask(talk, text))

    def _history(self, talk: Talk) -> list[int]:
        with self._engine.slots.borrow(talk.session) as state:
            return list(state.token_history)

    # The terminal

    def _heading(self, text: str) -> None:
        self._headings += 1
        self._console.print(f"\n[bold]{self._headings}. {text}[/]")

    def _say(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style, markup=False)

    def _claim(self, text: str, true: bool) -> None:  # noqa: FBT001  It is what the claim is.
        self._claims += 1
        if not true:
            self._false.append(text)
        fancy = self._console.encoding.startswith("utf")
        mark = ("✓" if fancy else "yes") if true else ("✗" if fancy else "NO")
        style = "green" if true else "bold red"
        self._console.print(Text.assemble("  ", (mark, style), "  ", text))

    @contextmanager
    def _waiting(self, text: str) -> Generator[None, None, None]:
        if not self._console.is_terminal:
            yield
            return
        with self._console.status(f"[dim]{text}[/]"):
            yield

    @contextmanager
    def _shown(self, talks: Sequence[Talk]) -> Generator[Callable[[], None], None, None]:
        """Show conversations while they grow: call the yielded function after each change."""
        if not self._console.is_terminal:
            yield lambda: None
        else:
            with Live(console=self._console, auto_refresh=False, transient=True) as live:
                last = 0.0

                def show() -> None:
                    nonlocal last
                    if time.monotonic() > last + SECONDS_BETWEEN_FRAMES:
                        live.update(self._panels(talks), refresh=True)
                        last = time.monotonic()

                show()
                yield show
        self._console.print(self._panels(talks))

    def _panels(self, talks: Sequence[Talk]) -> Table:
        """Return conversations side by side, as many as the terminal has room for."""
        fitting = (n for n in (4, 2) if n * COLUMN_WIDTH <= self._console.width)
        columns = min(next(fitting, 1), len(talks))
        grid = Table.grid(expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1)
        for start in range(0, len(talks), columns):
            row = talks[start : start + columns]
            texts = [self._text(talk) for talk in row]
            inside = self._console.width // columns - 4
            lines = max(len(text.wrap(self._console, inside)) for text in texts)
            grid.add_row(
                *(
                    Panel(text, title=talk.title, title_align="left", height=lines + 2)
                    for talk, text in zip(row, texts, strict=True)
                )
            )
        return grid

    def _text(self, talk: Talk) -> Text:
        answer = printable(self._tokenizer.decode(talk.answer))
        return Text.assemble((talk.messages[-1][1], "cyan"), "\n", answer)


def smollm2_engine() -> LlamaEngine:
    """Make an engine of the real model."""
    return LlamaEngine(load(find_weights())[0])


def answer_elsewhere(
    engine: LlamaEngine,
    path: Path,
    tokens: Sequence[int],
    count: int,
    *,
    sample: Sampler,
    stop: Collection[int],
) -> list[int]:
    """Take a conversation, make `tokens` its history, answer, and save it."""
    session = engine.slots.restore(path, take=True)
    engine.prompt(session, tokens)
    answer = list(engine.stream(session, count, sample=sample, stop=stop))
    engine.slots.save(session, path)
    return answer


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    differ = (i for i, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1])
    return next(differ, min(len(left), len(right)))


def _same(talks: Sequence[Talk], twins: Sequence[Talk]) -> bool:
    return [talk.answer for talk in talks] == [twin.answer for twin in twins]


@contextmanager
def stopwatch() -> Generator[Callable[[], float], None, None]:
    """Yield a function that returns, after the block, its duration in milliseconds."""
    start = time.perf_counter()
    end = start
    yield lambda: (end - start) * 1000
    end = time.perf_counter()
