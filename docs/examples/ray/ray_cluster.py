"""Conversations on several machines, with Ray: actors hold the sessions, the driver the tokens.

A session stays where its KV cache is. Only its id and its tokens travel, so an actor can die at any
time: another gets the tokens, under the same id, and the conversation goes on.

`ray_demo.py` shows it on a real model.
"""
# Ray's types are known in part only.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import asyncio
import os
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Self, TypeAlias, TypeVar, cast
from uuid import UUID, uuid4

import ray
from ray.actor import ActorHandle, ActorProxy
from ray.exceptions import RayActorError

from inference_session import Session, SessionRegistry
from inference_session.exceptions import (
    SessionBusyError,
    SessionClosedError,
    SessionExistsError,
    SessionNotFoundError,
)
from numpy_llama import LlamaEngine, greedy, sampling


T = TypeVar("T")
Actor: TypeAlias = "ActorProxy[EngineActor]"

ATTEMPTS = 3
"""How often a step or a start is tried, each time on another actor, before it fails."""


class EngineActor:
    """An engine in a process of its own, with the sessions whose KV caches are there.

    Every call carries all tokens. A session that is here saves the work for their common prefix;
    a missing one is opened, and everything is prefilled. So any actor can take a call, even if it
    has never had the session, and the outcome of earlier calls doesn't matter.
    """

    def __init__(
        self, make_engine: Callable[[], LlamaEngine], make_registry: Callable[[], SessionRegistry]
    ) -> None:
        self._engine = make_engine()
        self._registry = make_registry()

    @ray.method
    def prefill(self, session_id: UUID, tokens: Sequence[int]) -> int:
        """Make `tokens` the history of a session, and return how many of them were reused."""
        return self._engine.prompt(self._session(session_id), tokens)

    @ray.method
    def decode(
        self, session_id: UUID, tokens: Sequence[int], count: int, seed: int | None
    ) -> list[int]:
        """Return the next `count` tokens after `tokens`; fewer at the end of the context."""
        sample = greedy if seed is None else sampling(seed=seed)
        session = self._session(session_id)
        steps = self._engine.answer(session, lambda _: tokens, count, sample=sample)
        return [step.token for step in steps if step.token is not None]

    @ray.method
    def close(self, session_id: UUID) -> None:
        """Close a session if it is here; a step under way ends soon."""
        with suppress(SessionNotFoundError):
            self._registry.close(session_id)

    @ray.method
    def pid(self) -> int:
        """Return the id of the process."""
        return os.getpid()

    def _session(self, session_id: UUID) -> Session:
        with suppress(SessionExistsError):
            return self._registry.open(session_id)
        return self._registry[session_id]


@dataclass(eq=False)
class Conversation:
    """The driver's record of a session."""

    session_id: UUID
    seed: int | None
    tokens: array[int] = field(default_factory=partial(array, "i"))
    """Replaced, never changed: another object means another state."""
    actor: Actor | None = None
    """The session's actor; None until there is one, and after its death."""


class Cluster:
    """Engine actors, and the conversations that outlive them; for the tasks of one event loop.

    Errors of the engine and the library come back from the actors unchanged, `session_id`
    included. A failed or cancelled step changes nothing.
    """

    def __init__(
        self,
        make_engine: Callable[[], LlamaEngine],
        make_registry: Callable[[], SessionRegistry] = SessionRegistry,
        *,
        actors: int = 2,
        threads: int = 8,
    ) -> None:
        actor = ray.remote(EngineActor).options(num_cpus=1, max_concurrency=threads)
        self._new_actor: Callable[[], Actor] = partial(actor.remote, make_engine, make_registry)
        self._size = actors
        self._actors: list[Actor] = []  # Only those ready for work.
        self._starting: set[asyncio.Task[None]] = set()
        self._conversations: dict[UUID, Conversation] = {}

    async def __aenter__(self) -> Self:
        for _ in range(self._size):
            self._start_actor()
        await asyncio.gather(*self._starting)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._starting:
            task.cancel()
        for actor in self._actors:
            kill(actor)

    async def open(
        self, tokens: Sequence[int], *, session_id: UUID | None = None, seed: int | None = None
    ) -> UUID:
        """Begin a conversation, on the actor with the fewest.

        Its tokens are the likeliest ones; with a seed, they are drawn.
        """
        session_id = session_id or uuid4()
        if session_id in self._conversations:
            raise SessionExistsError(session_id)
        self._conversations[session_id] = Conversation(session_id, seed)
        try:
            await self.prompt(session_id, tokens)
        except BaseException:
            with suppress(SessionNotFoundError):  # Closed already.
                await self.close(session_id)
            raise
        return session_id

    async def prompt(self, session_id: UUID, tokens: Sequence[int]) -> int:
        """Make `tokens` the conversation, and return how many of them were reused."""
        conversation = self._find(session_id)
        reused = await self._step(
            conversation, lambda actor: actor.prefill.remote(session_id, tokens)
        )
        conversation.tokens = array("i", tokens)
        return reused

    async def decode(self, session_id: UUID, count: int = 1) -> list[int]:
        """Add the next tokens to a conversation, and return them."""
        conversation = self._find(session_id)
        tokens, seed = conversation.tokens, conversation.seed
        new = await self._step(
            conversation, lambda actor: actor.decode.remote(session_id, tokens, count, seed)
        )
        conversation.tokens = tokens + array("i", new)
        return new

    async def close(self, session_id: UUID) -> None:
        """End a conversation; a step under way ends soon."""
        conversation = self._find(session_id)
        del self._conversations[session_id]
        if conversation.actor is not None:
            with suppress(RayActorError):
                await conversation.actor.close.remote(session_id)

    def tokens(self, session_id: UUID) -> list[int]:
        """Return all tokens of a conversation."""
        return self._find(session_id).tokens.tolist()

    async def actor(self, session_id: UUID) -> Actor:
        """Return the actor of a conversation's session, present or future."""
        return await self._actor_of(self._find(session_id))

    async def _step(self, conversation: Conversation, call: Callable[[Actor], Awaitable[T]]) -> T:
        """Call the session's actor; if that is gone, move the session to another one."""
        session_id, tokens = conversation.session_id, conversation.tokens
        for attempts_left in reversed(range(ATTEMPTS)):
            actor = await self._actor_of(conversation)
            try:
                result = await call(actor)
            except (RayActorError, SessionNotFoundError, SessionClosedError) as error:
                # The actor died or is out of reach (ActorDiedError, ActorUnavailableError). Or its
                # registry was full, and has just closed this session to make room for another.
                if isinstance(error, RayActorError):
                    self._replace(actor)
                if not attempts_left or self._conversations.get(session_id) is not conversation:
                    raise
            else:
                if self._conversations.get(session_id) is not conversation:
                    await actor.close.remote(session_id)
                    raise SessionClosedError(session_id)
                if conversation.tokens is not tokens:  # Another step was quicker.
                    raise SessionBusyError(session_id)
                return result
        raise AssertionError  # The last attempt has returned or raised.

    def _find(self, session_id: UUID) -> Conversation:
        try:
            return self._conversations[session_id]
        except KeyError:
            raise SessionNotFoundError(session_id) from None

    async def _actor_of(self, conversation: Conversation) -> Actor:
        """Return the actor of a conversation; if it has none, choose the one with the fewest."""
        while conversation.actor is None:
            while not self._actors:  # They all died.
                if not self._starting:  # And so did the last replacement.
                    self._start_actor()
                done, _ = await asyncio.wait(self._starting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            load = Counter(other.actor for other in self._conversations.values())
            actor = conversation.actor = min(self._actors, key=lambda actor: load[actor])
            try:
                await actor.pid.remote()  # Is it alive?
            except RayActorError:
                self._replace(actor)
        return conversation.actor

    def _replace(self, actor: Actor) -> None:
        for conversation in self._conversations.values():
            if conversation.actor == actor:
                conversation.actor = None
        if actor in self._actors:  # Else another step was the first to see it.
            self._actors.remove(actor)
            kill(actor)  # Even if it was only out of reach: nobody will call it any more.
            self._start_actor()

    def _start_actor(self) -> None:
        self._starting.add(asyncio.create_task(self._start()))

    async def _start(self) -> None:
        try:
            for attempts_left in reversed(range(ATTEMPTS)):
                actor = self._new_actor()
                try:
                    await actor.pid.remote()  # From here on, its model is loaded.
                except RayActorError:
                    if not attempts_left:
                        raise
                else:
                    self._actors.append(actor)
                    return
        finally:
            self._starting = {task for task in self._starting if task is not asyncio.current_task()}


def kill(actor: Actor) -> None:
    """Let Ray end an actor, if it is there."""
    ray.kill(cast("ActorHandle[EngineActor]", actor))
