"""The chat server, as its clients see it: OpenAI's own client, and raw sockets that vanish."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import openai
import pytest
import uvicorn
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam
from tests.terminal import CTRL_C, needs_terminal, nox_command, terminal

import server
from inference_session import Session, SessionRegistry
from llama_model import Batch, Floats, Llama, random_model
from numpy_llama import LlamaEngine
from server import MODEL, ChatServer, Tokenizer, WebServer
from smollm2 import Message, find_weights, load


QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
CONTEXT_LENGTH = 1500
LONG = 1200
"""Tokens of an answer that is still under way when the next request comes."""


class Letters:
    """A tokenizer for a random model: a letter is a token."""

    def __init__(self) -> None:
        self.end_of_turn = 0

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the letters of a conversation."""
        turns = "".join(f"{role}:{text}\0" for role, text in messages)
        return [ord(letter) for letter in f"{turns}assistant:"]

    def continue_chat(self, history: Sequence[int], messages: Sequence[Message]) -> list[int]:
        """Return the letters of a conversation that goes on."""
        end = [] if history[-1] == 0 else [0]
        return [*history, *end, *self.encode_chat(messages)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the letters of tokens, but for the end of a turn."""
        return "".join(map(chr, tokens)).rstrip("\0")


class Running:
    """A server in a thread of its own, on a port of its own."""

    def __init__(self, chat: ChatServer, *, grace: int = 10) -> None:
        self.chat = chat
        self.engine = chat.engine
        self.registry = chat.registry
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        config = uvicorn.Config(chat.app, log_config=None)
        self.server = WebServer(config, grace=grace)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.client = OpenAI(base_url=self.url, api_key="none", max_retries=0)

    def stop(self) -> None:
        """Ask it to end, and wait until it has."""
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def ask(self, *texts: str, session_id: object = None, **more: object) -> ChatCompletion:
        """Have the texts of a conversation answered: the user's, the assistant's, the user's..."""
        extra = {} if session_id is None else {"session_id": str(session_id)}
        return self.client.chat.completions.create(
            model=MODEL,
            messages=talk(*texts),
            temperature=0,
            max_completion_tokens=12,
            extra_body={**extra, **more},
        )

    def stream(
        self, *texts: str, session_id: object = None, **more: object
    ) -> openai.Stream[ChatCompletionChunk]:
        """Ask the same, streamed."""
        extra = {} if session_id is None else {"session_id": str(session_id)}
        return self.client.chat.completions.create(
            model=MODEL,
            messages=talk(*texts),
            temperature=0,
            max_completion_tokens=12,
            stream=True,
            extra_body={**extra, **more},
        )

    def session(self, reply: ChatCompletion | ChatCompletionChunk) -> Session:
        """Return the session of a reply."""
        return self.registry[session_id(reply)]

    def history(self, session: Session) -> list[int]:
        """Return the tokens of a session that is free."""
        with self.engine.slots.borrow(session) as state:
            return list(state.token_history)


def talk(*texts: str) -> list[ChatCompletionMessageParam]:
    """Return the messages of a conversation that the user began."""
    return [
        {"role": "assistant", "content": text} if turn % 2 else {"role": "user", "content": text}
        for turn, text in enumerate(texts)
    ]


def session_id(reply: ChatCompletion | ChatCompletionChunk) -> UUID:
    """Return the id that a client goes on with."""
    assert reply.model_extra is not None
    return UUID(reply.model_extra["session_id"])


def text_of(reply: ChatCompletion) -> str:
    """Return what the model said."""
    text = reply.choices[0].message.content
    assert text is not None
    return text


def cached(reply: ChatCompletion) -> int:
    """Return how many tokens of the prompt were reused."""
    assert reply.usage is not None
    assert reply.usage.prompt_tokens_details is not None
    tokens = reply.usage.prompt_tokens_details.cached_tokens
    assert tokens is not None
    return tokens


def code_of(error: openai.APIStatusError) -> tuple[int, object]:
    """Return the status and the code of an error."""
    return error.status_code, error.code


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what is to happen at once, for a server that has other things to do."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def is_idle(session: Session) -> bool:
    """Tell whether nobody has borrowed the session."""
    return " idle," in repr(session)


@contextmanager
def running(
    model: Llama,
    registry: SessionRegistry | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    chunk: int = 256,
    grace: int = 10,
) -> Generator[Running, None, None]:
    """Run a server; check in the end that it closed all sessions, and freed their memory once."""
    engine = LlamaEngine(model, chunk=chunk)
    if registry is None:  # One that is empty is false, as any collection.
        registry = SessionRegistry()
    run = Running(ChatServer(engine, tokenizer or Letters(), registry, threads=2), grace=grace)
    with run.socket, run.client:
        run.thread.start()
        try:
            wait_until(lambda: run.server.started)
            yield run
        finally:
            run.stop()
    assert len(registry) == 0
    wait_until(lambda: engine.memory.created == engine.memory.released)
    assert engine.memory.used == 0


@contextmanager
def monitored(measure: Callable[[], int]) -> Generator[list[int], None, None]:
    """Give a list of what was measured after each pass through the model."""
    measured: list[int] = []
    forward = Llama.forward

    def watched(model: Llama, batch: Batch) -> Floats:
        hidden = forward(model, batch)
        measured.append(measure())
        return hidden

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Llama, "forward", watched)
        yield measured


@contextmanager
def held_up() -> Generator[Callable[[], None]]:
    """Let no step end until the block does, or the function is called: who comes finds it under way."""
    finish = threading.Event()
    with monitored(lambda: finish.wait(60)):
        try:
            yield finish.set
        finally:
            finish.set()


@pytest.fixture(scope="module")
def model() -> Llama:
    """Give a small model with a long context, which doesn't end its turn by itself."""
    model = random_model(4, context_length=CONTEXT_LENGTH)
    model.output[:, Letters().end_of_turn] = 0
    return model


@pytest.fixture
def run(model: Llama) -> Iterator[Running]:
    """Give a server without limits."""
    with running(model) as run:
        yield run


# The real model


@pytest.fixture(scope="module")
def real() -> Iterator[Running]:
    """Give a server with a model that makes sense."""
    model, tokenizer = load(find_weights())
    run = Running(ChatServer(LlamaEngine(model), tokenizer, SessionRegistry()))
    with run.socket, run.client:
        run.thread.start()
        try:
            wait_until(lambda: run.server.started)
            yield run
        finally:
            run.stop()
    assert run.engine.memory.used == 0


def test_real_answer(real: Running) -> None:
    """A real client gets a real answer, complete with what it took."""
    reply = real.ask(QUESTION)
    assert text_of(reply) == ANSWER
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 8
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 8
    assert reply.model == MODEL
    assert cached(reply) == 0


def test_real_conversation(real: Running) -> None:
    """Going on by id is the same as sending it all again, and both compute only what is new."""
    first = real.ask(QUESTION)
    by_id = real.ask("And of Italy?", session_id=session_id(first))
    other = real.ask(QUESTION)
    in_full = real.ask(QUESTION, ANSWER, "And of Italy?", session_id=session_id(other))
    afresh = real.ask(QUESTION, ANSWER, "And of Italy?")
    assert "Rome" in text_of(by_id)
    assert text_of(by_id) == text_of(in_full) == text_of(afresh)
    assert by_id.usage is not None
    assert afresh.usage is not None
    assert by_id.usage.prompt_tokens == afresh.usage.prompt_tokens
    assert first.usage is not None
    assert cached(by_id) == cached(in_full) == first.usage.total_tokens - 1
    assert cached(afresh) == 0
    assert session_id(by_id) == session_id(first) != session_id(afresh)


def test_real_async_stream(real: Running) -> None:
    """Streamed to an asynchronous client, the pieces are those of the answer."""

    async def main() -> None:
        async with AsyncOpenAI(base_url=real.url, api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model=MODEL,
                messages=talk(QUESTION),
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in stream]
        header = stream.response.headers["x-session-id"]
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
        assert "".join(pieces) == ANSWER
        assert len(pieces) == 2 + 7  # The role, the words, the reason why it ended.
        assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "stop"]
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 8
        assert {session_id(chunk) for chunk in chunks} == {UUID(header)}
        assert len({chunk.id for chunk in chunks}) == 1

    asyncio.run(main())


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_real_curl(real: Running) -> None:
    """What the page says to type into a shell does what it says."""
    page = Path(server.__file__).with_name("index.md").read_text("utf-8")
    (command,) = re.findall(r"^```sh\n(curl .*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert "127.0.0.1:8000" in command
    shell = command.replace(":8000", f":{real.port}").replace("curl ", "curl -sS ", 1)
    run = subprocess.run(["sh", "-c", shell], capture_output=True, encoding="utf-8", check=True)
    pieces = re.findall(r'"delta": \{"content": "([^"]*)"\}', run.stdout)
    assert "".join(pieces) == ANSWER
    assert run.stdout.endswith("data: [DONE]\n\n")


# The protocol


def test_streamed_or_not(run: Running) -> None:
    """The answer is the same text, and as long as was asked for."""
    whole = text_of(run.ask("Hi", max_completion_tokens=30))
    with run.stream("Hi", max_completion_tokens=30) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert len(whole) == 30
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


class Halves(Letters):
    """A tokenizer for which a token is a letter, or a piece of a character."""

    pieces = (b"a", b"\xe6", b"\x9d\xb1", b"\xf0\x9f", b"\x99\x82")  # Of 東 and 🙂, among others.

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, as far as it is one."""
        return b"".join(self.pieces[token % 5] for token in tokens).decode(errors="replace")


@pytest.mark.parametrize("seed", range(4))
def test_characters_are_whole(model: Llama, seed: int) -> None:
    """A character is streamed when it is complete, whatever halves it is among."""
    more = {"temperature": 1.5, "seed": seed, "max_completion_tokens": 100}
    with running(model, tokenizer=Halves()) as run:
        with run.stream("Hi", **more) as stream:
            pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        whole = text_of(run.ask("Hi", **more))
    assert "".join(pieces) == whole
    assert not any(piece.endswith("\N{REPLACEMENT CHARACTER}") for piece in pieces[:-2])
    assert set(whole) > {"a", "🙂", "\N{REPLACEMENT CHARACTER}"}


def test_events(run: Running) -> None:
    """On the wire they are server-sent events that end with [DONE]."""
    body = {"model": MODEL, "messages": talk("Hi"), "stream": True, "max_tokens": 3}
    response = httpx.post(f"{run.url}/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk["session_id"] for chunk in chunks} == {response.headers["x-session-id"]}


def test_length(run: Running) -> None:
    """Both names of the limit count; without one, the server's default does."""
    completions = run.client.chat.completions
    short = completions.create(model=MODEL, messages=talk("Hi"), max_tokens=5)
    assert len(text_of(short)) == 5
    assert short.choices[0].finish_reason == "length"
    default = completions.create(model=MODEL, messages=talk("Hi"), temperature=0)
    assert default.usage is not None
    assert default.usage.completion_tokens == run.chat.max_tokens


def test_stop(run: Running) -> None:
    """An answer ends with the end of its turn, which is no text."""
    whole = text_of(run.ask("Hi"))
    run.chat.tokenizer.end_of_turn = ord(whole[5])
    reply = run.ask("Hi")
    run.chat.tokenizer.end_of_turn = 0
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == whole.index(whole[5]) + 1


def test_context_is_full(run: Running) -> None:
    """An answer that fills the context ends there, for want of room."""
    reply = run.ask("x" * (CONTEXT_LENGTH - 24))
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.total_tokens == CONTEXT_LENGTH


def test_sampling(run: Running) -> None:
    """A seed says what is drawn; without one, each answer is another."""

    def sampled(**more: object) -> str:
        return text_of(run.ask("Hi", **{"temperature": 1.3, **more}))

    assert sampled(seed=5) == sampled(seed=5) != sampled(seed=6)
    assert sampled(seed=-5) == sampled(seed=-5) != sampled(seed=5)
    assert sampled() != sampled()
    assert sampled(temperature=5e-324) == text_of(run.ask("Hi"))  # As small as a float can be.
    assert sampled(seed=5, top_p=1e-9) == sampled(seed=6, top_p=1e-9) == text_of(run.ask("Hi"))


def test_parts_of_a_message(run: Running) -> None:
    """Content in parts is the text of all parts, and what is harmless is let pass."""
    reply = run.client.chat.completions.create(
        model=MODEL,
        messages=[
            {
                "role": "user",
                "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}],
            }
        ],
        temperature=0,
        max_completion_tokens=12,
        n=1,
        user="somebody",
    )
    assert text_of(reply) == text_of(run.ask("Hi"))


def test_models_and_health(run: Running) -> None:
    """A client can ask what there is, and an operator how it is."""
    assert [each.id for each in run.client.models.list()] == [MODEL]
    run.ask("Hi")
    health = httpx.get(run.url.replace("/v1", "/health")).json()
    assert health == {"status": "ok", "sessions": 1, "kv_bytes": run.engine.memory.used}
    assert health["kv_bytes"] > 0


def test_a_step_holds_up_nobody(run: Running) -> None:
    """While a step is under way, however long it takes, the server answers others."""
    started, finish = threading.Event(), threading.Event()

    def hold() -> int:
        started.set()
        return finish.wait(30)

    with monitored(hold) as steps:
        asking = threading.Thread(target=run.ask, args=("Hi",))
        asking.start()
        try:
            assert started.wait(30)
            assert httpx.get(run.url.replace("/v1", "/health")).json()["sessions"] == 1
            assert steps == []
        finally:
            finish.set()
            asking.join()
    assert len(steps) > 1


# Errors

WRONG: list[tuple[Mapping[str, object], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "wizard", "content": "hush"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "hush \ud83d"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    ({"temperature": 2.5}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "body"),
    ({"stream_options": {"include_usage": True}}, "body"),
    ({"messages": talk(*2**18 * ["hush"])}, "body"),
    ({"temperature": math.nan}, "temperature"),
    ({"n": 2}, "n"),
    ({"session_id": "hush"}, "session_id"),
    ({"session_id": ""}, "session_id"),
    ({"tools": ["hush"]}, "tools"),
    ({"stop": "hush"}, "stop"),
    ({"logprobs": True}, "logprobs"),
]


def post_raw(run: Running, body: bytes) -> httpx.Response:
    """Send bytes as they are."""
    headers = {"Content-Type": "application/json"}
    return httpx.post(f"{run.url}/chat/completions", content=body, headers=headers, timeout=60)


@pytest.mark.parametrize(("wrong", "param"), WRONG, ids=lambda value: ascii(value)[:60])
def test_invalid_requests(run: Running, wrong: Mapping[str, object], param: str) -> None:
    """What makes no sense, or would not be heeded, is named, and not said again."""
    body = {"model": MODEL, "messages": talk("hush"), **wrong}
    response = post_raw(run, json.dumps(body).encode())
    error = response.json()["error"]
    assert response.status_code == 422
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "invalid_request"
    assert error["param"].startswith(param)
    assert "hush" not in response.text
    assert len(run.registry) == 0


def test_null_is_as_good_as_nothing(run: Running) -> None:
    """Many clients send all there is, with null for what nobody has set."""
    nothing = ("n", "stop", "tools", "seed", "top_p", "stream", "stream_options", "session_id")
    reply = run.ask("Hi", **dict.fromkeys(nothing))
    assert text_of(reply) == text_of(run.ask("Hi"))


def test_spellings_of_an_id(run: Running) -> None:
    """However an id is spelled, it is that of the same session, which says it in one way."""
    first = session_id(run.ask("Hi"))
    for spelling in (str(first).upper(), f"{{{first}}}", first.urn, first.hex):
        assert session_id(run.ask("Go on", session_id=spelling)) == first
    assert len(run.registry) == 1


def test_not_json(run: Running) -> None:
    """Nor does a body that is no JSON stop the server."""
    response = post_raw(run, b"{hush")
    assert response.status_code == 422
    assert "hush" not in response.text
    response = post_raw(run, b"[" * 100_000)
    assert response.status_code in {400, 422}
    assert text_of(run.ask("Hi"))


@pytest.mark.parametrize("stream", [False, True])
def test_bad_tokens(run: Running, stream: bool) -> None:  # noqa: FBT001
    """Tokens that the model does not know are 422, streamed or not, and the session is as it was."""
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        run.ask("ü", stream=stream)
    assert code_of(caught.value) == (422, "invalid_tokens")
    assert len(run.registry) == 0  # What it opened for that is closed again.
    first = run.ask("Hi")
    before = run.history(run.session(first))
    for bad in ("ü", "x" * CONTEXT_LENGTH):
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            run.ask(bad, session_id=session_id(first), stream=stream)
        assert code_of(caught.value) == (422, "invalid_tokens")
        assert "ü" not in str(caught.value)
        assert "xx" not in str(caught.value)
    assert run.history(run.session(first)) == before


def test_too_long(run: Running) -> None:
    """The error says how long is too long."""
    with pytest.raises(openai.UnprocessableEntityError, match=f"a context of {CONTEXT_LENGTH}"):
        run.ask("x" * CONTEXT_LENGTH)


def test_unknown(run: Running) -> None:
    """A session, a model or a path that is not there is 404, in OpenAI's form."""
    with pytest.raises(openai.NotFoundError, match="send the whole conversation") as caught:
        run.ask("Hi", session_id=uuid4())
    assert code_of(caught.value) == (404, "session_not_found")
    with pytest.raises(openai.NotFoundError, match="The model here is") as caught:
        run.client.chat.completions.create(model="gpt-5", messages=talk("Hi"))
    assert code_of(caught.value) == (404, "not_found")
    with pytest.raises(openai.NotFoundError):
        run.client.files.list()
    assert len(run.registry) == 0


def test_closed_and_idle_sessions(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that the registry closed, for others or for being idle, is 404 from then on."""
    monkeypatch.setattr(server, "SECONDS_BETWEEN_SWEEPS", 0.05)
    with running(model, SessionRegistry(max_sessions=2)) as run:
        ids = [session_id(run.ask("Hi")) for _ in range(3)]
        with pytest.raises(openai.NotFoundError):
            run.ask("Hi", session_id=ids[0])
        assert text_of(run.ask("Go on", session_id=ids[2]))
    with running(model, SessionRegistry(idle_timeout=0.5)) as run:
        idle = session_id(run.ask("Hi"))
        wait_until(lambda: len(run.registry) == 0)  # Nobody asks for anything meanwhile.
        assert run.engine.memory.used == 0
        with pytest.raises(openai.NotFoundError):
            run.ask("Hi", session_id=idle)


def test_busy(run: Running) -> None:
    """Of two requests on one session at once, one is refused, and the other does not notice."""
    expected = text_of(run.ask("Hi", max_completion_tokens=LONG))
    with run.stream("Hi", max_completion_tokens=LONG) as stream:
        chunk = next(stream)
        with held_up(), pytest.raises(openai.ConflictError) as caught:
            run.ask("Me, too", session_id=session_id(chunk))
        assert code_of(caught.value) == (409, "session_busy")
        assert caught.value.response.headers["retry-after"] == "1"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == expected
    assert text_of(run.ask("Me, too", session_id=session_id(chunk)))


def test_many_at_once_on_one_session(run: Running) -> None:
    """Of many requests at the same instant, one is answered."""
    first = run.ask("Hi")
    refused: list[int] = []

    async def attempt(client: AsyncOpenAI) -> None:
        try:
            await client.chat.completions.create(
                model=MODEL,
                messages=talk("Me"),
                temperature=0,
                max_completion_tokens=12,
                extra_body={"session_id": str(session_id(first))},
            )
        except openai.ConflictError as error:
            refused.append(error.status_code)
            if len(refused) == 7:
                finish()

    async def main() -> None:
        async with AsyncOpenAI(base_url=run.url, api_key="none", max_retries=0) as client:
            await asyncio.gather(*(attempt(client) for _ in range(8)))

    with held_up() as finish:
        asyncio.run(main())
    assert refused == 7 * [409]
    alone = run.ask("Hi", text_of(first), "Me")
    again = run.registry[session_id(first)]
    assert run.history(again) == run.history(run.session(alone))


def test_full(model: Llama) -> None:
    """When all sessions are answering, a new one is 503; when one has ended, it is welcome."""
    with running(model, SessionRegistry(max_sessions=2)) as run:
        streams = [run.stream("Hi", max_completion_tokens=LONG) for _ in range(2)]
        sessions = [run.session(next(stream)) for stream in streams]
        with pytest.raises(openai.InternalServerError) as caught:
            run.ask("Hi")
        assert code_of(caught.value) == (503, "server_full")
        assert caught.value.response.headers["retry-after"] == "1"
        streams[0].close()
        wait_until(lambda: is_idle(sessions[0]))
        assert text_of(run.ask("Hi"))
        assert sessions[0].closed  # It made way for the new one.
        assert not sessions[1].closed
        streams[1].close()


def test_closed_meanwhile(run: Running) -> None:
    """A session that is closed in mid-answer ends its stream with an error, and is gone."""
    with run.stream("Hi", max_completion_tokens=LONG) as stream:
        session = run.session(next(stream))
        run.registry.close(session.id)
        with pytest.raises(openai.APIError, match="was closed meanwhile") as caught:
            list(stream)
    assert caught.value.code == "session_closed"
    assert session.token_count == 0
    with pytest.raises(openai.NotFoundError):
        run.ask("Go on", session_id=session.id)


def test_out_of_memory(run: Running) -> None:
    """An answer that runs out of memory says so in its stream; then it can be continued."""
    with run.stream("Hi", max_completion_tokens=100) as stream:
        session = run.session(next(stream))
        run.engine.memory.limit = run.engine.memory.used
        with pytest.raises(openai.APIError, match="There is no memory"):
            list(stream)
    wait_until(lambda: is_idle(session))
    history = run.history(session)
    assert len(history) == 65  # What its KV cache has room for, and a token to go on from.
    with pytest.raises(openai.InternalServerError) as caught:
        run.ask("Hi")
    assert code_of(caught.value) == (503, "out_of_memory")
    run.engine.memory.limit = 2 * run.engine.memory.used
    with pytest.raises(openai.InternalServerError) as caught:
        run.ask("Hi", max_completion_tokens=100)  # In mid-answer, but nobody has its id.
    assert code_of(caught.value) == (503, "out_of_memory")
    assert list(run.registry) == [session.id]
    run.engine.memory.limit = None
    text = "".join(map(chr, history)).rpartition("assistant:")[2]
    by_id, in_full = run.ask("Go on", session_id=session.id), run.ask("Hi", text, "Go on")
    assert text_of(by_id) == text_of(in_full)


# Conversations


def test_a_conversation_in_full_reuses_its_prefix(run: Running) -> None:
    """Sent again in full, under its id, only what is new is computed, and the answer is the same."""
    texts = ["Hi"]
    first = run.ask(*texts)
    assert first.usage is not None
    texts += [text_of(first), "Tell me more"]
    again, afresh = run.ask(*texts, session_id=session_id(first)), run.ask(*texts)
    assert text_of(again) == text_of(afresh)
    assert cached(again) == first.usage.total_tokens - 1
    edited = run.ask("Hi", "Who are you?", "Tell me more", session_id=session_id(first))
    assert cached(edited) == len("user:Hi\0assistant:")
    assert text_of(edited) == text_of(run.ask("Hi", "Who are you?", "Tell me more"))


def test_by_id_is_in_full(run: Running) -> None:
    """However a conversation is sent, by id or in full, its tokens are the same, turn after turn."""
    by_id = run.ask("0")
    in_full = run.ask("0")
    texts = ["0"]
    for turn in range(1, 6):
        assert text_of(by_id) == text_of(in_full)
        texts += [text_of(in_full), str(turn)]
        by_id = run.ask(str(turn), session_id=session_id(by_id))
        in_full = run.ask(*texts, session_id=session_id(in_full))
        assert cached(by_id) == cached(in_full) > 20 * turn
    histories = [run.history(run.session(reply)) for reply in (by_id, in_full)]
    assert histories[0] == histories[1]


def test_hundreds_of_conversations(model: Llama) -> None:
    """They stay under the budget together; those evicted to that end go on as if nothing was."""
    count, at_once = 200, 8
    alone = LlamaEngine(model)
    with Session() as session:
        alone.prefill(session, [1] * 60)
        cache = alone.memory.used
    budget = 20 * cache
    texts: list[list[str]] = [[] for _ in range(count)]
    ids: list[dict[str, str]] = [{} for _ in range(count)]
    reused: list[int] = []
    with running(model, SessionRegistry(max_kv_bytes=budget)) as run:

        async def say(client: AsyncOpenAI, index: int, text: str) -> None:
            reply = await client.chat.completions.create(
                model=MODEL,
                messages=talk(text),
                max_completion_tokens=4,
                temperature=0,
                extra_body=ids[index],
            )
            texts[index] += [text, text_of(reply)]
            ids[index] = {"session_id": str(session_id(reply))}
            reused.append(cached(reply))

        async def main() -> None:
            async with AsyncOpenAI(base_url=run.url, api_key="none", max_retries=0) as client:
                for turn in range(2):
                    waiting = list(range(count))

                    async def work(turn: int, waiting: list[int]) -> None:
                        while waiting:
                            index = waiting.pop()
                            await say(client, index, f"{index}:{turn}")

                    async with asyncio.TaskGroup() as group:
                        for _ in range(at_once):
                            group.create_task(work(turn, waiting))

        with monitored(lambda: run.engine.memory.used) as used:
            asyncio.run(main())
        assert len(run.registry) == count
        assert run.engine.memory.created >= 2 * count - at_once  # Evicted, and computed anew.
        assert max(used) <= budget + at_once * cache
        assert run.engine.memory.used <= budget
        assert sorted(reused)[: count + 100] == [0] * (count + 100)
        for said in texts[::40]:
            assert text_of(run.ask(*said[:-1], max_completion_tokens=4)) == said[-1]


# Clients that leave


@contextmanager
def visit(run: Running, body: Mapping[str, object]) -> Generator[socket.socket, None, None]:
    """Send a request by a raw socket, which is closed at the end."""
    text = json.dumps({"model": MODEL, "temperature": 0, **body})
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", run.port)) as connection:
        connection.sendall(f"{head}{text}".encode())
        yield connection


def be_rude(connection: socket.socket) -> None:
    """Have the connection end by a reset instead of a farewell."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("rudely", [False, True])
def test_client_leaves_a_stream(run: Running, rudely: bool) -> None:  # noqa: FBT001
    """Its session is free at once, has what was sent, and goes on as any other."""
    with visit(run, {"messages": talk("Hi"), "stream": True, "max_tokens": LONG}) as connection:
        received = ""
        while received.count("data: ") < 10:
            received += connection.recv(1000).decode()
        (found,) = set(re.findall(r'"session_id": "([^"]*)"', received))
        session = run.registry[UUID(found)]
        assert not is_idle(session)
        if rudely:
            be_rude(connection)
    wait_until(lambda: is_idle(session))
    sent = re.findall(r'"delta": \{"content": ("(?:[^"\\]|\\.)*")\}', received)
    history = "".join(map(chr, run.history(session)))
    assert history.startswith("user:Hi\0assistant:" + "".join(map(json.loads, sent)))
    assert len(history) < LONG / 2
    text = history.rpartition("assistant:")[2]
    by_id, in_full = run.ask("Go on", session_id=session.id), run.ask("Hi", text, "Go on")
    assert text_of(by_id) == text_of(in_full)


@pytest.mark.parametrize("stream", [False, True])
def test_client_leaves_in_mid_prompt(model: Llama, stream: bool) -> None:  # noqa: FBT001
    """The prompt is not read to its end, and the session is as it was before."""
    long = {"messages": talk("x" * (CONTEXT_LENGTH - 200)), "stream": stream, "max_tokens": 3}
    with running(model, chunk=4) as run, monitored(lambda: 1) as steps:
        session = run.session(run.ask("Hi"))
        before = run.history(session)
        steps.clear()
        with visit(run, {**long, "session_id": str(session.id)}):
            wait_until(lambda: len(steps) > 3)
            assert not is_idle(session)
        wait_until(lambda: is_idle(session))
        assert len(steps) < CONTEXT_LENGTH / 8
        assert run.history(session) == before
        text = "".join(map(chr, before)).rpartition("assistant:")[2]
        again = run.ask("Go on", session_id=session.id)
        assert text_of(again) == text_of(run.ask("Hi", text, "Go on"))

        steps.clear()
        count = len(run.registry)
        with visit(run, long) as connection:
            wait_until(lambda: len(steps) > 3)
            assert len(run.registry) == count + 1
            be_rude(connection)
        wait_until(lambda: len(run.registry) == count)  # Nobody knows its id.


def test_client_leaves_an_answer_that_is_not_streamed(run: Running) -> None:
    """It, too, is broken off; a session that was opened for it is closed, as nobody knows its id."""
    session = run.session(run.ask("Hi"))
    count = session.token_count
    body = {"messages": talk("More"), "max_tokens": LONG, "session_id": str(session.id)}
    with visit(run, body):
        wait_until(lambda: session.token_count > count + 30)
    wait_until(lambda: is_idle(session))
    assert session.token_count < LONG / 2
    assert text_of(run.ask("Go on", session_id=session.id))
    with visit(run, {"messages": talk("Hi"), "max_tokens": LONG}):
        wait_until(lambda: len(run.registry) == 2)
        (new,) = (run.registry[each] for each in run.registry if each != session.id)
        wait_until(lambda: new.token_count > 30)
    wait_until(lambda: len(run.registry) == 1)
    assert new.closed


def test_async_clients_are_cancelled(run: Running) -> None:
    """Tasks that are cancelled or break out of their streams leave their sessions free."""

    async def read(client: AsyncOpenAI, sessions: list[Session], count: int) -> None:
        stream = await client.chat.completions.create(
            model=MODEL, messages=talk("Hi"), max_tokens=LONG, temperature=0, stream=True
        )
        async with stream:
            async for chunk in stream:
                if not sessions:
                    sessions.append(run.session(chunk))
                count -= 1
                if not count:
                    break

    async def main() -> list[Session]:
        async with AsyncOpenAI(base_url=run.url, api_key="none", max_retries=0) as client:
            taken: list[list[Session]] = [[] for _ in range(6)]
            leaving = [asyncio.create_task(read(client, each, 5)) for each in taken[:3]]
            cancelled = [asyncio.create_task(read(client, each, LONG)) for each in taken[3:]]
            await asyncio.gather(*leaving)
            await asyncio.to_thread(wait_until, lambda: all(taken))
            for task in cancelled:
                task.cancel()
            await asyncio.wait(cancelled)
            return [session for each in taken for session in each]

    sessions = asyncio.run(main())
    assert len(sessions) == 6
    wait_until(lambda: all(is_idle(session) for session in sessions))
    for session in sessions:
        assert session.token_count < LONG / 2
        assert text_of(run.ask("Go on", session_id=session.id))


# The end


def test_shutdown_waits_for_answers(model: Llama) -> None:
    """An answer under way is finished when the server is told to end; then all is closed."""
    with running(model, grace=60) as run:
        expected = text_of(run.ask("Hi", max_completion_tokens=300))
        with run.stream("Hi", max_completion_tokens=300) as stream:
            next(stream)
            run.server.should_exit = True
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == expected


def test_shutdown_does_not_wait_for_ever(model: Llama) -> None:
    """Answers that take longer are broken off, and their sessions closed."""
    with running(model, grace=0) as run:
        with run.stream("Hi", max_completion_tokens=LONG) as stream:
            session = run.session(next(stream))
            run.server.should_exit = True
            with pytest.raises((httpx.HTTPError, openai.APIError)):
                list(stream)
        wait_until(lambda: session.closed)
        assert session.token_count < LONG


@pytest.fixture
def program() -> Iterator[subprocess.Popen[str]]:
    """Give the server as a user runs it."""
    path = str(Path(server.__file__))
    with subprocess.Popen(
        [sys.executable, "-u", path, "--port", "0", "--grace", "1"],
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONWARNINGS": "error"},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_program(program: subprocess.Popen[str]) -> None:
    """The program serves, ends in mid-stream when told to, and its log has ids but no text."""
    assert program.stdout is not None
    log = ""
    while not (found := re.search(r"running on (http://\S+)", log)):
        line = program.stdout.readline()
        assert line, log
        log += line
    with OpenAI(base_url=f"{found[1]}/v1", api_key="none", max_retries=0) as client:
        first = client.chat.completions.create(model=MODEL, messages=talk(QUESTION), temperature=0)
        assert text_of(first) == ANSWER
        with pytest.raises(openai.UnprocessableEntityError):
            client.chat.completions.create(model=MODEL, messages=talk("Paris " * 9000))
        with client.chat.completions.create(
            model=MODEL, messages=talk("Tell me a story."), stream=True, max_tokens=4000
        ) as stream:
            ids = {session_id(first), session_id(next(stream))}
            program.send_signal(signal.SIGTERM)
            with pytest.raises((httpx.HTTPError, openai.APIError)):
                list(stream)
    rest, _ = program.communicate(timeout=30)
    log += rest
    assert "Application shutdown complete" in log
    assert all(f"session {each}" in log for each in ids)
    assert "Traceback" not in log
    for word in ("Paris", "capital", "France", "story"):
        assert word not in log


def can_be_listened_on(port: int) -> bool:
    """Tell whether nobody has a port."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


@contextmanager
def answering(port: int, *, max_tokens: int) -> Generator[Iterator[ChatCompletionChunk]]:
    """Give the rest of an answer by the server on a port, once it has begun."""
    with (
        OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client,
        client.chat.completions.create(
            model=MODEL,
            messages=talk("Tell me a story."),
            stream=True,
            max_tokens=max_tokens,
            seed=1,
        ) as stream,
    ):
        next(stream)
        yield stream


@needs_terminal
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_command_lets_answers_finish(tmp_path: Path, how: str) -> None:
    """The page's command, told to end by a key or a supervisor, does so when all answers are finished."""
    command = nox_command("server", "--port", "0", "--grace", "100", directory=tmp_path)
    with terminal(command) as run:
        port = int(run.wait_for(r"running on http://127.0.0.1:(\d+)")[1])
        with answering(port, max_tokens=100) as stream:
            assert not can_be_listened_on(port)
            if how == "Ctrl-C":
                run.type(CTRL_C)
            else:
                os.kill(run.pid, signal.SIGTERM)
            run.wait_for("Waiting for connections to close")
            *_, last = stream
        assert last.choices[0].finish_reason == "length"
        run.wait_for("Application shutdown complete")
        assert run.wait() == (130 if how == "Ctrl-C" else -signal.SIGTERM)
    assert can_be_listened_on(port)


@needs_terminal
@pytest.mark.parametrize("grace", [0, 1000])
def test_command_breaks_answers_off(tmp_path: Path, grace: int) -> None:
    """After the grace or a second Ctrl-C the command ends in good order all the same."""
    command = nox_command("server", "--port", "0", "--grace", str(grace), directory=tmp_path)
    with terminal(command) as run:
        port = int(run.wait_for(r"running on http://127.0.0.1:(\d+)")[1])
        with answering(port, max_tokens=4000) as stream:
            run.type(CTRL_C)
            if grace:
                run.wait_for("Waiting for connections to close")
                run.type(CTRL_C)
            assert run.wait() == 130
            with pytest.raises((httpx.HTTPError, openai.APIError)):
                list(stream)
        assert "Application shutdown complete" in run.output
        assert "Traceback" not in run.output
    assert can_be_listened_on(port)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", ""], "--host: is empty"),
        (["--port", "-1"], "--port: must be a whole number from 0 to 65535"),
        (["--port", "65536"], "--port: must be a whole number from 0 to 65535"),
        (["--port", "http"], "not 'http'"),
        (["--threads", "0"], "--threads: must be a whole number from 1"),
        (["--threads", "1.5"], "not '1.5'"),
        (["--max-tokens", "0"], "--max-tokens: must be a whole number from 1"),
        (["--max-sessions", "0"], "--max-sessions: must be a whole number from 1"),
        (["--idle-timeout", "0"], "--idle-timeout: must be a whole number from 1"),
        (["--idle-timeout", "nan"], "not 'nan'"),
        (["--max-kv-megabytes", "-1"], "--max-kv-megabytes: must be a whole number from 0"),
        (["--grace", "-1"], "--grace: must be a whole number from 0"),
        (["--thread", "1"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A wrong argument is named in a line, before the model is looked for."""
    monkeypatch.setattr(sys, "argv", ["server.py", *arguments])
    monkeypatch.setattr(server, "find_weights", lambda: pytest.fail("loads the model"))
    with pytest.raises(SystemExit) as caught:
        server.main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def broken(model: Llama, hidden: Floats) -> Floats:
    """Fail as no model should."""
    raise ZeroDivisionError


@pytest.mark.parametrize("stream", [False, True])
def test_failure(run: Running, stream: bool) -> None:  # noqa: FBT001
    """An error that nobody expected is in OpenAI's form, too, and the session goes on."""
    with run.stream("Hi", max_completion_tokens=LONG) as events:
        session = run.session(next(events))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Llama, "logits", broken)
            with pytest.raises(openai.APIError, match="This server has failed") as caught:
                list(events)
            assert caught.value.code == "internal_error"
            with pytest.raises(openai.InternalServerError, match="This server has failed") as late:
                run.ask("Hi", session_id=session.id, stream=stream)
    assert code_of(late.value) == (500, "internal_error")
    assert text_of(run.ask("Go on", session_id=session.id))


def test_logs_show_nothing(run: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever happens, and however much is logged, no text and no token is."""
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # They are the client's.
    first = run.ask("hush, hush")
    run.ask("hush again", session_id=session_id(first))
    for bad in ("hush ü", "hush" * CONTEXT_LENGTH):
        with pytest.raises(openai.UnprocessableEntityError):
            run.ask(bad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Llama, "logits", broken)
        with pytest.raises(openai.InternalServerError) as caught:
            run.ask("hush", session_id=session_id(first))
    assert caught.value.status_code == 500
    with run.stream("hush", max_completion_tokens=LONG) as stream:
        session = run.session(next(stream))
    wait_until(lambda: is_idle(session))
    assert "Traceback" in caplog.text  # The web server's own log is in it.
    assert re.search(f"session {session_id(first)}: .*: ZeroDivisionError", caplog.text)
    assert "hush" not in caplog.text
    assert text_of(first) not in caplog.text
    tokens = run.history(run.session(first))
    numbers = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "", caplog.text)
    assert not re.search(rf"{tokens[0]}\D+{tokens[1]}\D+{tokens[2]}\b", numbers)
