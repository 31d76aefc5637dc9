"""A chat server over the NumPy engine: OpenAI's protocol, and a session to go on with.

An answer borrows its session once, from the prompt to the last token. So the library's promises
hold for the server: of two requests at once one is refused, an answer under way is never evicted,
and a client that leaves gives its session back. `server.md` explains how to run it and talk to it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, closing
from http import HTTPStatus
from socket import socket
from threading import Lock
from types import FrameType
from typing import Protocol

import uvicorn
from anyio import CancelScope, CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send


# NumPy reads it once; steps have threads enough.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import openai_chat as protocol
from inference_session import Session, SessionRegistry
from inference_session.exceptions import (
    RegistryFullError,
    SessionBusyError,
    SessionClosedError,
    SessionNotFoundError,
)
from numpy_llama import LlamaEngine, Sampler, Step, greedy, sampling
from smollm2 import Message, find_weights, load


MODEL = "smollm2-135m-instruct"
SECONDS_BETWEEN_SWEEPS = 10
GONE = "There is no such session, or no longer: send the whole conversation, without an id."
ERRORS: Mapping[type[Exception], tuple[int, str, str]] = {
    SessionBusyError: (409, "session_busy", "This session is answering another request."),
    SessionNotFoundError: (404, "session_not_found", GONE),
    SessionClosedError: (503, "session_closed", "The session was closed meanwhile; try again."),
    RegistryFullError: (503, "server_full", "All sessions are answering; try again soon."),
    MemoryError: (503, "out_of_memory", "There is no memory for this now; try again soon."),
    ValueError: (422, "invalid_tokens", ""),  # The engine says what is wrong with them.
    Exception: (500, "internal_error", "This server has failed; its log says how."),
}
log = logging.getLogger("chat_server")


class Tokenizer(Protocol):
    """The tokenizer's interface for the server; `smollm2.ChatTokenizer` explains it."""

    end_of_turn: int

    def encode_chat(self, messages: Sequence[Message]) -> list[int]: ...  # noqa: D102
    def continue_chat(  # noqa: D102
        self, history: Sequence[int], messages: Sequence[Message]
    ) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...  # noqa: D102


class ChatServer:
    """Serves an engine; `app` is to be run by a web server."""

    def __init__(
        self,
        engine: LlamaEngine,
        tokenizer: Tokenizer,
        registry: SessionRegistry,
        *,
        max_tokens: int = 256,
        threads: int = 1,
    ) -> None:
        """Compute up to `threads` steps at once; answers have at most `max_tokens` by default."""
        self.engine = engine
        self.tokenizer = tokenizer
        self.registry = registry
        self.max_tokens = max_tokens
        self.limiter = CapacityLimiter(threads)
        self.app = FastAPI(lifespan=self._lifespan, docs_url=None, redoc_url=None)
        self.app.post("/v1/chat/completions")(self.chat)
        self.app.get("/v1/models")(self.models)
        self.app.get("/health")(self.health)
        for kind in (*ERRORS, RequestValidationError, HTTPException):
            self.app.add_exception_handler(kind, refuse)

    async def chat(self, body: protocol.ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        if body.model != MODEL:
            raise HTTPException(404, f"The model here is {MODEL}.")
        response = await while_connected(request, self._respond(body))
        return response or Response(status_code=499)  # Nobody reads it but the log.

    async def models(self) -> dict[str, object]:
        """List the one model."""
        return protocol.model_list(MODEL)

    async def health(self) -> dict[str, object]:
        """Return the present load."""
        sessions, kv_bytes = len(self.registry), self.engine.memory.used
        return {"status": "ok", "sessions": sessions, "kv_bytes": kv_bytes}

    async def _respond(self, body: protocol.ChatRequest) -> Response:
        with ExitStack() as stack:
            answer = stack.enter_context(closing(Answer(self, body)))
            reply = await answer.begin()
            headers = {"X-Session-Id": str(reply.session_id)}
            if body.stream:
                stack.pop_all()  # The stream closes it.
                usage = body.stream_options is not None and body.stream_options.include_usage
                return EventStream(answer, reply, usage=usage, headers=headers)
            while await answer.step():
                pass
            completion = reply.completion(answer.text, answer.finish_reason, answer.usage)
            return JSONResponse(completion, headers=headers)

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncGenerator[None, None]:
        with self.registry:  # Closes all sessions: steps under way end early.
            sweeper = asyncio.create_task(self._close_idle())
            yield
            sweeper.cancel()

    async def _close_idle(self) -> None:
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_SWEEPS)
            await to_thread.run_sync(self.registry.close_idle)


class Answer:
    """An answer while it grows, from the lookup of its session to the last token."""

    def __init__(self, server: ChatServer, request: protocol.ChatRequest) -> None:
        self.text = ""
        self.finish_reason = ""
        self._server = server
        self._request = request
        self._tokens: list[int] = []
        self._prompt_length = self._fed = 0
        self._session: Session | None = None
        self._steps = self._run()
        self._running = Lock()
        self._closed = False

    async def begin(self) -> protocol.Reply:
        """Go as far as the first token: errors up to there can still be an HTTP status."""
        while not self._tokens:
            await self.step()
        assert self._session is not None
        return protocol.Reply(model=MODEL, session_id=self._session.id)

    async def step(self) -> bool:
        """Take a step, in a thread; return whether there was one left.

        If the client leaves, this waits for the thread. If the server exits, it can't: the thread
        then ends the answer after this step.
        """
        step = await to_thread.run_sync(self._next, limiter=self._server.limiter)
        return step is not None

    def close(self) -> None:
        """Give the session back with the tokens so far, at once or after the step under way."""
        self._closed = True
        if self._running.acquire(blocking=False):  # Else its thread comes here when it's done.
            try:
                self._steps.close()
            finally:
                self._running.release()

    def _next(self) -> Step | None:
        try:
            with self._running:
                return next(self._steps, None)
        finally:
            if self._closed:
                self.close()

    @property
    def usage(self) -> protocol.Usage:
        """The numbers of tokens so far."""
        return protocol.Usage(
            prompt=self._prompt_length,
            cached=self._prompt_length - self._fed,
            completion=len(self._tokens),
        )

    def _run(self) -> Generator[Step, None, None]:
        """All the work, in steps; each runs in a thread."""
        registry, tokenizer = self._server.registry, self._server.tokenizer
        id_ = self._request.session_id
        self._session = session = registry.open() if id_ is None else registry[id_]
        log.info("session %s: %s", session.id, "opened" if id_ is None else "continued")
        outcome = "broken off"
        try:
            with closing(self._engine_steps(session)) as steps:
                for step in steps:
                    if not self._tokens:
                        self._fed += step.fed
                    if step.token is not None:
                        self._tokens.append(step.token)
                        text = tokenizer.decode(self._tokens)
                        self.text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # Half a character.
                    yield step
            self.text = tokenizer.decode(self._tokens)
            ended = self._tokens[-1] == tokenizer.end_of_turn
            self.finish_reason = outcome = "stop" if ended else "length"
            yield Step(0)
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            told = self._tokens if self._request.stream else self.finish_reason
            if id_ is None and not told:  # Nobody knows its id.
                session.close()
            log.info(
                "session %s: fed %d of %d tokens, wrote %d: %s",
                session.id,
                self._fed,
                self._prompt_length,
                len(self._tokens),
                outcome,
            )

    def _engine_steps(self, session: Session) -> Generator[Step, None, None]:
        server, request = self._server, self._request
        sample: Sampler = greedy
        if request.temperature > 0:
            seed = secrets.randbits(63) if request.seed is None else request.seed % 2**63
            sample = sampling(temperature=request.temperature, top_p=request.top_p, seed=seed)
        return server.engine.answer(
            session,
            self._prompt,
            request.max_completion_tokens or request.max_tokens or server.max_tokens,
            sample=sample,
            stop={server.tokenizer.end_of_turn},
        )

    def _prompt(self, history: Sequence[int]) -> Sequence[int]:
        """Return the new history: messages of the user alone continue the present one."""
        messages: list[Message] = [(each.role, each.text) for each in self._request.messages]
        tokenizer = self._server.tokenizer
        if history and all(role == "user" for role, _ in messages):
            tokens = tokenizer.continue_chat(history, messages)
        else:
            tokens = tokenizer.encode_chat(messages)
        self._prompt_length = len(tokens)
        return tokens


class EventStream(StreamingResponse):
    """An answer as server-sent events; it ends as soon as the client leaves."""

    def __init__(
        self, answer: Answer, reply: protocol.Reply, *, usage: bool, headers: Mapping[str, str]
    ) -> None:
        super().__init__(
            self._events(answer, reply, usage=usage),
            media_type="text/event-stream",
            headers=headers,
        )
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        with closing(self._answer):
            await super().__call__(scope, receive, send)

    async def _events(
        self, answer: Answer, reply: protocol.Reply, *, usage: bool
    ) -> AsyncGenerator[str, None]:
        sent = 0
        yield reply.chunk({"role": "assistant", "content": ""})
        try:
            more = True
            while more:
                if len(answer.text) > sent:
                    yield reply.chunk({"content": answer.text[sent:]})
                    sent = len(answer.text)
                more = await answer.step()
        except Exception as error:
            status, code, message = explain(error)
            yield protocol.event(protocol.error(status, code, message))
            if status == HTTPStatus.INTERNAL_SERVER_ERROR:
                log.exception("an answer failed")
            return
        yield reply.chunk({}, answer.finish_reason)
        if usage:
            yield reply.usage_chunk(answer.usage)
        yield protocol.END_OF_STREAM


class WebServer(uvicorn.Server):
    """A web server that gives answers some seconds when it is told to end, and none when told again.

    Then its clients count as gone, which ends answers in good order. uvicorn would cancel them, or
    skip the end of the application.
    """

    def __init__(self, config: uvicorn.Config, *, grace: int) -> None:
        super().__init__(config)
        self._grace = grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: D102
        if self.should_exit:
            asyncio.get_running_loop().call_soon_threadsafe(self._drop_clients)
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:  # noqa: D102
        timer = asyncio.get_running_loop().call_later(self._grace, self._drop_clients)
        await super().shutdown(sockets)
        timer.cancel()

    def _drop_clients(self) -> None:
        for connection in self.server_state.connections:
            connection.transport.abort()


async def while_connected(request: Request, work: Awaitable[Response]) -> Response | None:
    """Wait for work; if the client leaves, cancel it and return None."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    with CancelScope() as scope:
        watcher = asyncio.create_task(watch())
        try:
            return await work
        finally:
            watcher.cancel()
    return None


async def refuse(request: Request, error: Exception) -> Response:
    """Answer with an error."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]  # Its "input" is a client's text: don't repeat it.
        where = ".".join(str(part) for part in first["loc"][1:]) or "body"
        body = protocol.error(422, "invalid_request", f"{where}: {first['msg']}", where)
        return JSONResponse(body, 422)
    if isinstance(error, HTTPException):
        code = HTTPStatus(error.status_code).name.lower()
        body = protocol.error(error.status_code, code, error.detail)
        return JSONResponse(body, error.status_code, error.headers)
    status, code, message = explain(error)
    headers = {"Retry-After": "1"} if status in {409, 503} else {}
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        headers["Connection"] = "close"  # uvicorn closes it in any case.
    return JSONResponse(protocol.error(status, code, message), status, headers)


def explain(error: Exception) -> tuple[int, str, str]:
    """Return an error's HTTP status, code and message."""
    status, code, message = next(ERRORS[kind] for kind in ERRORS if isinstance(error, kind))
    return status, code, message or str(error)


def main() -> None:
    """Serve SmolLM2 until a signal comes."""
    parser = argparse.ArgumentParser(
        description="Serve SmolLM2 over OpenAI's chat protocol.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    option = parser.add_argument
    option("--host", type=address, default="127.0.0.1", help="address to listen on")
    option("--port", type=number(0, 65535), default=8000, help="port; 0 takes a free one")
    option("--threads", type=number(1), default=1, help="how many steps to compute at once")
    option("--max-tokens", type=number(1), default=256, help="of an answer, if not requested")
    option("--max-sessions", type=number(1), default=1000, help="conversations to keep")
    option("--idle-timeout", type=number(1), default=3600, help="seconds to keep an idle one")
    option("--max-kv-megabytes", type=number(0), default=1024, help="of KV caches to keep")
    option("--grace", type=number(0), default=10, help="seconds for answers at shutdown")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s:     %(message)s")
    model, tokenizer = load(find_weights())
    registry = SessionRegistry(
        max_sessions=given.max_sessions,
        idle_timeout=given.idle_timeout,
        max_kv_bytes=given.max_kv_megabytes * 2**20,
    )
    server = ChatServer(
        LlamaEngine(model),
        tokenizer,
        registry,
        max_tokens=given.max_tokens,
        threads=given.threads,
    )
    config = uvicorn.Config(server.app, host=given.host, port=given.port)
    WebServer(config, grace=given.grace).run()


def number(least: int, most: int = 10**9) -> Callable[[str], int]:
    """Return what reads a whole number within limits."""

    def read(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {least} to {most}, not {text!r}"
            )
        return int(text)

    return read


def address(text: str) -> str:
    """Check that there is an address: none at all would mean every one of this machine."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; 0.0.0.0 is every address of this machine")
    return text


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # While the model was loaded, or from uvicorn when it has ended.
        sys.exit(130)
