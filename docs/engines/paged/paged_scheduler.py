"""Continuous batching for the paged engine: requests join and leave between two passes.

Each request is a generator that holds its session's borrow and commits token by token. So whatever
ends a request, its own error or its client leaving, takes back its own last step alone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar
from weakref import WeakKeyDictionary

from inference_session import Session
from inference_session.engine import BorrowedState
from inference_session.exceptions import SessionClosedError, SessionError
from llama_model import Floats
from numpy_llama import Sampler, greedy
from paged_engine import BlockTable, PagedEngine


T = TypeVar("T")
State = BorrowedState[BlockTable]


@dataclass(eq=False, slots=True, kw_only=True)
class _Request:
    session: Session
    tokens: Sequence[int]
    """What is still to be added to the session."""
    left: int
    """How many tokens to decode."""
    sample: Sampler
    stop: Collection[int]
    out: asyncio.Queue[int | BaseException | None] = field(
        default_factory=asyncio.Queue[int | BaseException | None]
    )
    """To the client: tokens, and then None or an error."""
    cancelled: bool = False
    serving: Generator[State, tuple[int, Floats], None] = field(init=False)
    """Holds the borrow while the request runs."""
    state: State = field(init=False)


_Part = tuple[_Request, int]
"""A request, and how many of its tokens are fed in a pass."""


class Scheduler:
    """Serves requests to a `PagedEngine` in batches, for the length of an `async with` block.

    A pass takes a token of every request that is decoding, and up to `engine.chunk` tokens of those
    that still have a prompt to feed. If the pool has no room for that, the idle session that was
    used longest ago loses its KV cache; then the request that began last, which waits and is
    computed anew. The passes run in a thread, so the event loop stays responsive.
    """

    def __init__(self, engine: PagedEngine, *, max_running: int = 32) -> None:
        self.engine = engine
        self.max_running = max_running
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []  # The oldest first.
        self._idle: WeakKeyDictionary[Session, None] = WeakKeyDictionary()  # Unused longest first.
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            if not self._task.cancelled():
                self._task.result()  # Raises what has ended it.

    async def submit(
        self,
        tokens: Sequence[int],
        max_new: int,
        *,
        session: Session | None = None,
        sample: Sampler = greedy,
        stop: Collection[int] = (),
    ) -> AsyncGenerator[int, None]:
        """Add tokens to a session, or to a new one, and decode up to `max_new`, or one of `stop`.

        The request begins when it is first iterated over, and ends when the iterator is closed or
        its task is cancelled. Until the first token, this leaves the session as it was.
        """
        if max_new < 1:
            msg = "max_new must be at least 1"
            raise ValueError(msg)
        if self._task is None or self._task.done():
            msg = "the scheduler isn't running: submit within its `async with` block"
            raise RuntimeError(msg)
        request = _Request(
            session=Session() if session is None else session,
            tokens=tokens,
            left=max_new,
            sample=sample,
            stop=stop,
        )
        self._waiting.append(request)
        self._work.set()
        try:
            while (item := await request.out.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            request.cancelled = True
            self._work.set()
            if session is None:
                request.session.close()

    async def _run(self) -> None:
        try:
            while await self._work.wait():
                self._end_cancelled()
                self._admit()
                parts = self._plan()
                if not parts:
                    self._work.clear()
                    continue
                results = await _to_the_end(asyncio.to_thread(self._forward, parts))
                for (request, count), result in zip(parts, results, strict=True):
                    if isinstance(result, Exception):
                        self._go_on(request, request.serving.throw, result)
                    else:
                        self._go_on(request, request.serving.send, (count, result))
        finally:
            for request in [*self._running, *self._waiting]:
                self._end(request, RuntimeError("the scheduler has ended"))

    # One request

    def _serve(self, request: _Request) -> Generator[State, tuple[int, Floats], None]:
        """Hold the borrow; yield whenever tokens are to be fed, and get how many were, and logits."""
        engine, session = self.engine, request.session
        with engine.slots.borrow(session) as state:
            state.append(engine.check(request.tokens))
            engine.check_not_empty(state)
            state.rewind(len(state.token_history))  # Leaves a token to decode from.
            while request.left:
                engine.check_room(len(state.token_history) + 1)
                count, logits = yield state
                if session.closed:
                    raise SessionClosedError(session.id)
                engine.settle(state, count)
                if state.kv_length == len(state.token_history):
                    token = request.sample(logits, state.kv_length)
                    state.append([token])
                    state.commit()
                    request.tokens = ()
                    request.left = 0 if token in request.stop else request.left - 1
                    request.out.put_nowait(token)

    def _go_on(self, request: _Request, step: Callable[[T], State], value: T) -> None:
        """Let a request take its step, up to the next pass that it needs, or to its end."""
        try:
            request.state = step(value)
        except StopIteration:
            self._end(request, None)
        except Exception as error:  # noqa: BLE001 it is the client's
            self._end(request, error)

    def _end(self, request: _Request, outcome: BaseException | None) -> None:
        self._stop(request)
        self._idle[request.session] = None
        request.out.put_nowait(outcome)

    def _stop(self, request: _Request) -> None:
        """Go back to the last commit, and give up the borrow."""
        if request in self._running:
            self._running.remove(request)
            request.serving.close()

    # Who runs

    def _end_cancelled(self) -> None:
        for request in [*self._running, *self._waiting]:
            if request.cancelled:
                self._end(request, None)
        self._waiting = deque(request for request in self._waiting if not request.cancelled)

    def _admit(self) -> None:
        """Let waiting requests run, as long as there is room for all of their tokens."""
        while self._waiting and len(self._running) < self.max_running:
            request = self._waiting.popleft()
            self._idle.pop(request.session, None)
            self._running.append(request)
            request.serving = self._serve(request)
            self._go_on(request, next, request.serving)
            while request in self._running and not self._reserve([(request, self._unfed(request))]):
                pass
            if request in self._waiting:
                return

    def _plan(self) -> list[_Part]:
        """Return who is fed in the next pass, and how many tokens, when there is room for all."""
        while self._running:
            parts = self._share()
            if self._reserve(parts):
                return parts
        return []

    def _unfed(self, request: _Request) -> int:
        """Return how many tokens a request has to feed, after it has taken what others computed."""
        self.engine.reuse(request.state)
        return len(request.state.token_history) - request.state.kv_length

    def _share(self) -> list[_Part]:
        """Share out a pass: one token for each that is decoding, and a chunk for the others."""
        parts: list[_Part] = []
        spare = self.engine.chunk
        for request in self._running:
            count = self._unfed(request)
            if count > 1:
                count = min(count, spare)
                spare -= count
            if count:
                parts.append((request, count))
        return parts

    # Room

    def _reserve(self, parts: Sequence[_Part]) -> bool:
        """Reserve the blocks of a pass; or make some room, and return False, to be asked again."""
        try:
            self.engine.pool.reserve([(one.state.kv_cache, count) for one, count in parts])
        except MemoryError as error:
            self._make_room(error)
            return False
        return True

    def _make_room(self, error: MemoryError) -> None:
        """Evict an idle session, or else the youngest request; one that is alone fails."""
        if self._evict_idle():
            return
        youngest = self._running[-1]
        if len(self._running) == 1:
            self._go_on(youngest, youngest.serving.throw, error)
        else:
            self._stop(youngest)
            self._evict(youngest.session)
            self._waiting.appendleft(youngest)

    def _evict_idle(self) -> bool:
        for session in list(self._idle):
            del self._idle[session]
            if self._evict(session):
                return True
        return False

    def _evict(self, session: Session) -> bool:
        try:
            self.engine.slots.evict(session)
        except SessionError:  # Closed, or borrowed by somebody else.
            return False
        return True

    # A pass

    def _forward(self, parts: Sequence[_Part]) -> list[Floats | Exception]:
        """Feed all in one pass; if it fails, each half alone, down to the request at fault."""
        try:
            return [*self.engine.forward([(request.state, count) for request, count in parts])]
        except Exception as error:  # noqa: BLE001 it is the client's
            if len(parts) == 1:
                return [error]
        half = len(parts) // 2
        return self._forward(parts[:half]) + self._forward(parts[half:])


async def _to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Wait for a thread even when cancelled: nothing stops it, and it writes to the blocks."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    finally:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
