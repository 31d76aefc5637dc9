"""Conversations over real Ray: they go on as if nothing had happened, whatever dies under them."""
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from inference_session import Session, SessionRegistry
from inference_session.exceptions import (
    RegistryFullError,
    SessionBusyError,
    SessionClosedError,
    SessionError,
    SessionExistsError,
    SessionNotFoundError,
)
from llama_model import Batch, Floats, Llama, random_model
from numpy_llama import LlamaEngine, greedy, sampling
from ray_cluster import ATTEMPTS, Actor, Cluster, EngineActor, kill
from ray_demo import start_ray


DEMO = Path(__file__).with_name("ray_demo.py")
SENTENCE = (
    "send session.id, or make another session of it: state.branch() here, slots.save() elsewhere"
)
PROMPT = [random.Random(7).randrange(128) for _ in range(40)]
OTHER = [random.Random(8).randrange(128) for _ in range(23)]


@pytest.fixture(scope="module", autouse=True)
def cluster_of_one_machine() -> Iterator[None]:
    """Run Ray for the tests here."""
    start_ray(cpus=8)
    yield
    ray.shutdown()


def engine() -> LlamaEngine:
    """Make the engine of every actor, and that which tells what undisturbed answers are."""
    return LlamaEngine(random_model(1), chunk=16)


@dataclass(frozen=True, kw_only=True)
class SlowLlama(Llama):
    """Stops in the middle of a step: of the first whose pass makes a KV cache `length` tokens long."""

    length: int
    folder: Path

    def forward(self, batch: Batch) -> Floats:
        """Do the work, and wait before it can count."""
        hidden = super().forward(batch)
        if any(cache.length == self.length for cache, _ in batch):
            try:
                (self.folder / "reached").touch(exist_ok=False)
            except FileExistsError:
                return hidden
            while not (self.folder / "go").exists():
                time.sleep(0.001)
        return hidden


@dataclass(frozen=True, kw_only=True)
class DeadlyLlama(Llama):
    """Takes its process with it at some of the passes that find a KV cache `length` tokens long."""

    length: int
    folder: Path
    deadly: range

    def forward(self, batch: Batch) -> Floats:
        """Do the work, or die."""
        if any(cache.length == self.length for cache, _ in batch):
            die(self.folder, self.deadly)
        return super().forward(batch)


def die(folder: Path, deadly: range) -> None:
    """Kill this process, if the number of calls with this folder, by whatever process, is a deadly one."""
    for calls in itertools.count():
        with suppress(FileExistsError):
            (folder / str(calls)).touch(exist_ok=False)
            if calls in deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            return


def parts_of(model: Llama) -> dict[str, Any]:
    """Return what a model is made of."""
    return {part.name: getattr(model, part.name) for part in fields(model)}


@dataclass
class Stop:
    """A point in a step: somebody waits there, in whatever process."""

    length: int
    folder: Path

    def engine(self) -> LlamaEngine:
        """Make an engine that waits there."""
        parts = parts_of(random_model(1))
        return LlamaEngine(SlowLlama(**parts, length=self.length, folder=self.folder), chunk=16)

    async def reached(self) -> None:
        """Return when a step is there."""
        async with asyncio.timeout(60):
            while not (self.folder / "reached").exists():  # noqa: ASYNC110  in another process
                await asyncio.sleep(0.001)

    def go(self) -> None:
        """Let the step go on."""
        (self.folder / "go").touch()


def undisturbed(prompt: Sequence[int], count: int, seed: int | None = None) -> list[int]:
    """Return what follows a prompt, in a session of its own on this side of Ray."""
    alone, sample = engine(), greedy if seed is None else sampling(seed=seed)
    with Session() as session:
        alone.prefill(session, prompt)
        return [alone.decode(session, sample=sample).token for _ in range(count)]


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run a test in an event loop of its own, which must end."""
    asyncio.run(asyncio.wait_for(test, 100))


@asynccontextmanager
async def cluster_of(
    actors: int,
    make_engine: Callable[[], LlamaEngine] = engine,
    make_registry: Callable[[], SessionRegistry] = SessionRegistry,
) -> AsyncGenerator[Cluster]:
    """Give a cluster, and check in the end that no actor holds what the driver does not know of."""
    async with Cluster(make_engine, make_registry, actors=actors) as cluster:
        yield cluster
        for actor in cluster._actors:
            known = {key for key, one in cluster._conversations.items() if one.actor == actor}
            with suppress(ActorDiedError):
                assert await held(actor) <= known


async def held(actor: Actor) -> set[UUID]:
    """Return the ids of the sessions that an actor has."""

    def ids(self: EngineActor) -> set[UUID]:
        return set(self._registry)

    return cast("set[UUID]", await cast("Any", actor).__ray_call__.remote(ids))


async def kill_process(actor: Actor) -> None:
    """Kill the process of an actor."""
    os.kill(await actor.pid.remote(), signal.SIGKILL)


async def all_ready(cluster: Cluster) -> None:
    """Wait until all actors of a cluster are there."""
    while cluster._starting:
        await asyncio.wait(cluster._starting)


# What dies


@pytest.mark.parametrize("seed", [None, 3])
def test_process_is_killed_in_mid_decode(tmp_path: Path, seed: int | None) -> None:
    """SIGKILL in a step: the step is done elsewhere; every conversation goes on under its id, exactly."""

    async def test() -> None:
        stop = Stop(len(PROMPT) + 7, tmp_path)
        async with cluster_of(2, stop.engine) as cluster:
            ids = [await cluster.open(PROMPT[:n], seed=seed) for n in (40, 12, 23, 31)]
            for session_id in ids[1:]:
                await cluster.decode(session_id, 5)
            await cluster.decode(ids[0], 7)
            victim = await cluster.actor(ids[0])
            on_victim = {
                session_id for session_id in ids if await cluster.actor(session_id) == victim
            }
            step = asyncio.create_task(cluster.decode(ids[0], 4))
            await stop.reached()
            await kill_process(victim)

            new = await step
            assert await cluster.actor(ids[0]) != victim
            assert new == undisturbed(PROMPT, 11, seed)[7:]
            for session_id in ids:
                await cluster.decode(session_id, 20)
            for session_id, n in zip(ids, (40, 12, 23, 31), strict=True):
                tokens = cluster.tokens(session_id)
                assert tokens == PROMPT[:n] + undisturbed(PROMPT[:n], len(tokens) - n, seed)

            survivor = await cluster.actor(ids[0])
            assert len(on_victim) == 2
            assert on_victim <= await held(survivor)  # Under the same ids.
            await all_ready(cluster)
            assert len(cluster._actors) == 2
            assert victim not in cluster._actors

    run(test())


def test_ray_kills_between_steps() -> None:
    """An actor that dies when nobody calls it is seen to be dead by the next call, which still succeeds."""

    async def test() -> None:
        async with cluster_of(2) as cluster:
            first, second = await cluster.open(PROMPT), await cluster.open(OTHER, seed=1)
            await asyncio.gather(cluster.decode(first, 5), cluster.decode(second, 5))
            for session_id in (first, second, first):
                kill(await cluster.actor(session_id))
                await cluster.decode(session_id, 3)
            await cluster.decode(second, 3)
            assert cluster.tokens(first)[40:] == undisturbed(PROMPT, 11)
            assert cluster.tokens(second)[23:] == undisturbed(OTHER, 11, seed=1)

    run(test())


def test_all_actors_die_at_once() -> None:
    """However many actors have died unseen, conversations find one that lives, if they must wait for it."""

    async def test() -> None:
        async with cluster_of(ATTEMPTS) as cluster:
            ids = [await cluster.open(PROMPT) for _ in range(2 * ATTEMPTS)]
            for actor in list(cluster._actors):
                await kill_process(actor)
            for session_id in ids[:2]:  # One after the other: the first one meets all the dead.
                assert await cluster.decode(session_id, 6) == undisturbed(PROMPT, 6)
            answers = await asyncio.gather(
                *(cluster.decode(session_id, 6) for session_id in ids[2:])
            )
            assert answers == [undisturbed(PROMPT, 6)] * (2 * ATTEMPTS - 2)
            await all_ready(cluster)
            assert len(cluster._actors) == ATTEMPTS

    run(test())


def test_step_that_kills(tmp_path: Path) -> None:
    """A step that every actor dies of fails in the end, and spares the cluster's other conversations."""

    def engine_that_dies() -> LlamaEngine:
        model = random_model(1)
        length = len(PROMPT) + 2
        return LlamaEngine(
            DeadlyLlama(**parts_of(model), length=length, folder=tmp_path, deadly=range(100))
        )

    async def test() -> None:
        async with cluster_of(1, engine_that_dies) as cluster:
            other, deadly = await cluster.open(OTHER), await cluster.open(PROMPT)
            await cluster.decode(other)
            with pytest.raises(ActorDiedError):
                await cluster.decode(deadly, 5)
            assert cluster.tokens(deadly) == PROMPT
            await cluster.decode(other, 3)
            assert cluster.tokens(other)[23:] == undisturbed(OTHER, 4)

    run(test())


@pytest.mark.parametrize(
    ("actors", "length", "deadly"), [(2, 16, range(2)), (1, 42, range(2)), (2, 32, range(1, 2))]
)
def test_deaths_in_prefill_decode_and_replay(
    tmp_path: Path, actors: int, length: int, deadly: range
) -> None:
    """An actor dies in mid-step, the next one in the replay; another one gets through, exactly."""

    def engine_that_dies() -> LlamaEngine:
        model = random_model(1)
        return LlamaEngine(
            DeadlyLlama(**parts_of(model), length=length, folder=tmp_path, deadly=deadly),
            chunk=16,
        )

    async def test() -> None:
        async with cluster_of(actors, engine_that_dies) as cluster:
            other = await cluster.open(OTHER[:5], seed=2)
            session_id = await cluster.open(PROMPT)
            if deadly.start:  # It got through, and now it dies between two steps.
                await kill_process(await cluster.actor(session_id))
            assert await cluster.decode(session_id, 6) == undisturbed(PROMPT, 6)
            assert (tmp_path / str(deadly.stop)).exists()  # As many have died there as should.
            await all_ready(cluster)
            assert len(cluster._actors) == actors
            assert session_id in await held(await cluster.actor(session_id))
            assert await cluster.decode(other, 6) == undisturbed(OTHER[:5], 6, seed=2)

    run(test())


def test_actors_die_while_they_start(tmp_path: Path) -> None:
    """A start is tried again; one that fails for good fails the steps that wait for it, but not later ones."""

    def engine_that_dies() -> LlamaEngine:
        die(tmp_path, range(1, 3 + ATTEMPTS))
        return engine()

    async def test() -> None:
        async with cluster_of(1, engine_that_dies) as cluster:
            ids = [await cluster.open(PROMPT) for _ in range(2)]
            await kill_process(await cluster.actor(ids[0]))
            steps = [cluster.decode(session_id, 3) for session_id in ids]
            for failed in await asyncio.gather(*steps, return_exceptions=True):
                assert isinstance(failed, ActorDiedError)
            for session_id in ids:
                assert await cluster.decode(session_id, 3) == undisturbed(PROMPT, 3)
            assert len(cluster._actors) == 1

    run(test())


def test_actor_is_unavailable(tmp_path: Path) -> None:
    """An actor out of reach is given up as a dead one is, whatever it may have done."""

    async def test() -> None:
        stop = Stop(len(PROMPT) + 2, tmp_path)
        async with cluster_of(2, stop.engine) as cluster:
            # An actor that Ray is about to restart is unavailable, not dead.
            restarts = ray.remote(EngineActor).options(max_restarts=1, max_concurrency=8)
            actor: Actor = restarts.remote(stop.engine, SessionRegistry)
            cluster._actors.insert(0, actor)
            session_id = await cluster.open(PROMPT)
            assert await cluster.actor(session_id) == actor
            direct = actor.decode.remote(session_id, PROMPT, 3, None)
            await stop.reached()
            await kill_process(actor)
            with pytest.raises(ActorUnavailableError):
                await direct
            assert await cluster.decode(session_id, 3) == undisturbed(PROMPT, 3)
            await cluster.decode(session_id, 3)
            assert cluster.tokens(session_id)[40:] == undisturbed(PROMPT, 6)

    run(test())


def test_random_deaths() -> None:
    """Whatever order steps and deaths come in, no conversation shows it."""

    async def test() -> None:
        dice = random.Random(5)
        async with cluster_of(3) as cluster:
            prompts = [PROMPT[: dice.randint(1, 40)] for _ in range(6)]
            ids = [await cluster.open(prompts[seed], seed=seed) for seed in range(6)]
            for _ in range(8):
                chosen = dice.sample(ids, 3)
                steps = [
                    asyncio.create_task(cluster.decode(one, dice.randint(1, 9))) for one in chosen
                ]
                if dice.random() < 0.4:
                    await asyncio.sleep(dice.random() / 100)
                    kill(await cluster.actor(dice.choice(ids)))
                await asyncio.gather(*steps)
            for seed, session_id in enumerate(ids):
                tokens = cluster.tokens(session_id)
                expected = undisturbed(prompts[seed], len(tokens) - len(prompts[seed]), seed)
                assert tokens == prompts[seed] + expected

    run(test())


def test_engine_that_cannot_be_made() -> None:
    """A cluster whose actors can't load their model says so, and doesn't wait for ever."""

    def broken() -> LlamaEngine:
        raise FileNotFoundError("no weights")

    async def test() -> None:
        with pytest.raises(ActorDiedError, match="no weights"):
            async with cluster_of(1, broken):
                raise AssertionError

    run(test())


# Where sessions are


def test_load_spreads() -> None:
    """A conversation begins where there are the fewest; a new actor has none yet."""

    async def test() -> None:
        async with cluster_of(2) as cluster:
            ids = [await cluster.open(PROMPT) for _ in range(6)]
            assert sorted(Counter([await cluster.actor(one) for one in ids]).values()) == [3, 3]
            old = await cluster.actor(ids[0])
            await kill_process(old)
            await cluster.decode(ids[0])
            await all_ready(cluster)
            (new,) = {await cluster.actor(await cluster.open(PROMPT)) for _ in range(2)}
            assert new not in {old, await cluster.actor(ids[0])}

    run(test())


def test_prefix_is_reused_where_the_session_is() -> None:
    """A conversation goes to the actor that has it, so only what is new is prefilled; a new actor has nothing."""

    async def test() -> None:
        async with cluster_of(2) as cluster:
            ids = [await cluster.open(PROMPT), await cluster.open(OTHER)]
            assert await cluster.actor(ids[0]) != await cluster.actor(ids[1])
            for session_id in ids:
                await cluster.decode(session_id, 5)
                tokens = cluster.tokens(session_id)
                assert await cluster.prompt(session_id, [*tokens, 1, 2, 3]) == len(tokens) - 1
                assert await cluster.prompt(session_id, tokens[:10]) == 9
            tokens = [*cluster.tokens(ids[0]), 4, 5]
            kill(await cluster.actor(ids[0]))
            assert await cluster.prompt(ids[0], tokens) == 0
            assert await cluster.decode(ids[0], 9) == undisturbed(tokens, 9)

    run(test())


def test_full_registry_closes_the_least_recently_used() -> None:
    """An actor with room for two sessions serves three conversations: what it closed, it is told again."""

    async def test() -> None:
        small = partial(SessionRegistry, max_sessions=2)
        async with cluster_of(1, make_registry=small) as cluster:
            ids = [await cluster.open(prompt) for prompt in (PROMPT, OTHER, PROMPT[:9])]
            assert await held(await cluster.actor(ids[0])) == set(ids[1:])
            await cluster.decode(ids[2])  # It is there: nothing is closed for it.
            assert await held(await cluster.actor(ids[0])) == set(ids[1:])
            for _ in range(4):
                for session_id in ids:
                    await cluster.decode(session_id, 2)
            assert cluster.tokens(ids[0])[40:] == undisturbed(PROMPT, 8)
            assert cluster.tokens(ids[1])[23:] == undisturbed(OTHER, 8)
            assert cluster.tokens(ids[2])[9:] == undisturbed(PROMPT[:9], 9)

    run(test())


def test_crowd() -> None:
    """More conversations at once than sessions fit: each is told to wait or gets its tokens, and never others."""

    async def test() -> None:
        small = partial(SessionRegistry, max_sessions=2)
        async with cluster_of(1, make_registry=small) as cluster:
            refused = 0

            async def talk(seed: int) -> None:
                nonlocal refused
                session_id: UUID | None = None
                while session_id is None or len(cluster.tokens(session_id)) < 60:
                    try:
                        if session_id is None:
                            session_id = await cluster.open(PROMPT, seed=seed)
                        await cluster.decode(session_id, 2)
                    except RegistryFullError:
                        refused += 1
                assert cluster.tokens(session_id)[40:] == undisturbed(PROMPT, 20, seed)

            await asyncio.gather(*map(talk, range(6)))
            assert refused

    run(test())


# Errors


def test_session_is_sent_by_mistake() -> None:
    """Ray's error has the library's sentence in it, and the library's error behind it; nothing is sent."""

    async def test() -> None:
        async with cluster_of(1) as cluster:
            actor = await cluster.actor(await cluster.open(PROMPT))
            session = Session()
            with pytest.raises(TypeError, match="Could not serialize the argument") as one:
                actor.prefill.remote(session, [1])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            with pytest.raises(TypeError, match="Could not serialize the argument") as many:
                actor.prefill.remote([session], [1])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            with pytest.raises(TypeError, match="Could not serialize the put value") as put:
                ray.put(session)
            for caught in (one, many, put):
                assert SENTENCE in str(caught.value)
                assert type(caught.value.__cause__) is TypeError
                assert str(caught.value.__cause__).endswith(SENTENCE)

    run(test())


def test_session_is_returned_by_mistake() -> None:
    """An actor that returns a session fails with the library's error, and keeps the session."""

    async def test() -> None:
        async with cluster_of(1) as cluster:
            session_id = await cluster.open(PROMPT)

            def give(self: EngineActor) -> Session:
                return self._registry[session_id]

            with pytest.raises(TypeError, match=re.escape(SENTENCE)) as caught:
                await cast("Any", await cluster.actor(session_id)).__ray_call__.remote(give)
            assert isinstance(caught.value, RayTaskError)
            assert await cluster.decode(session_id, 5) == undisturbed(PROMPT, 5)

    run(test())


def test_session_is_busy(tmp_path: Path) -> None:
    """A second step at once fails with the library's error, type and id and all; the first one ends well."""

    async def test() -> None:
        stop = Stop(len(PROMPT), tmp_path)
        async with cluster_of(1, stop.engine) as cluster:
            session_id = await cluster.open(PROMPT)
            other = await cluster.open(OTHER)
            step = asyncio.create_task(cluster.decode(session_id))
            await stop.reached()
            for second in (cluster.decode(session_id), cluster.prompt(session_id, OTHER)):
                with pytest.raises(SessionBusyError) as caught:
                    await second
                assert isinstance(caught.value, RayTaskError)
                assert isinstance(caught.value, SessionError)
                assert caught.value.session_id == session_id
            assert await cluster.decode(other, 3) == undisturbed(OTHER, 3)  # Busy is one, not all.
            stop.go()
            assert [*await step, *await cluster.decode(session_id)] == undisturbed(PROMPT, 2)

    run(test())


def test_steps_that_race() -> None:
    """Of many steps at once on one conversation, each adds its tokens or fails as busy."""

    async def test() -> None:
        async with cluster_of(1) as cluster:
            session_id = await cluster.open(PROMPT)
            for _ in range(10):
                await asyncio.gather(
                    *(cluster.decode(session_id, n) for n in range(1, 6)), return_exceptions=True
                )
            results: list[list[int] | BaseException] = []
            before = len(cluster.tokens(session_id))
            for _ in range(10):
                results += await asyncio.gather(
                    *(cluster.decode(session_id, n) for n in range(1, 6)), return_exceptions=True
                )
            added = [token for new in results if isinstance(new, list) for token in new]
            assert all(isinstance(r, (list, SessionBusyError)) for r in results)
            assert len(added) >= 10
            tokens = cluster.tokens(session_id)
            assert tokens[before:] == added
            assert tokens == PROMPT + undisturbed(PROMPT, len(tokens) - 40)

    run(test())


def test_registry_is_full(tmp_path: Path) -> None:
    """With every session of an actor in mid-step there is no room for another: that is its own error."""

    async def test() -> None:
        stop = Stop(len(PROMPT), tmp_path)
        small = partial(SessionRegistry, max_sessions=1)
        async with cluster_of(1, stop.engine, small) as cluster:
            session_id = await cluster.open(PROMPT)
            step = asyncio.create_task(cluster.decode(session_id, 2))
            await stop.reached()
            refused = uuid4()
            with pytest.raises(RegistryFullError) as caught:
                await cluster.open(OTHER, session_id=refused)
            assert isinstance(caught.value, RayTaskError)
            with pytest.raises(SessionNotFoundError):
                cluster.tokens(refused)
            stop.go()
            assert await step == undisturbed(PROMPT, 2)
            await cluster.open(OTHER, session_id=refused)
            assert await cluster.decode(refused, 2) == undisturbed(OTHER, 2)

    run(test())


def test_unknown_id() -> None:
    """An id that was never opened, or is closed, is an error that is a KeyError, too; a known one can't be opened."""

    async def test() -> None:
        async with cluster_of(1) as cluster:
            session_id = await cluster.open(PROMPT)
            with pytest.raises(SessionExistsError) as exists:
                await cluster.open(OTHER, session_id=session_id)
            assert exists.value.session_id == session_id
            assert await cluster.decode(session_id, 3) == undisturbed(PROMPT, 3)
            await cluster.close(session_id)
            for unknown in (session_id, uuid4()):
                for call in (
                    cluster.decode(unknown),
                    cluster.prompt(unknown, PROMPT),
                    cluster.close(unknown),
                ):
                    with pytest.raises(SessionNotFoundError) as caught:
                        await call
                    assert isinstance(caught.value, KeyError)
                    assert caught.value.session_id == unknown
            await cluster.open(OTHER, session_id=session_id)
            assert await cluster.decode(session_id, 3) == undisturbed(OTHER, 3)

    run(test())


def test_bad_tokens() -> None:
    """Tokens that the engine refuses change nothing, and are not in the error."""

    async def test() -> None:
        async with cluster_of(1) as cluster:
            session_id = await cluster.open(PROMPT)
            refused = uuid4()
            for bad in ([5, 77777], [5, -77777], [5, 2**40 + 77777]):
                with pytest.raises(ValueError, match="token 1 of 2") as caught:
                    await cluster.prompt(session_id, bad)
                assert "77777" not in str(caught.value)
                with pytest.raises(ValueError, match="token 1 of 2"):
                    await cluster.open(bad, session_id=refused)
                assert refused not in await held(await cluster.actor(session_id))
            assert await cluster.decode(session_id, 3) == undisturbed(PROMPT, 3)

    run(test())


# Steps that nobody waits for


def test_step_is_cancelled(tmp_path: Path) -> None:
    """A cancelled step changes nothing: busy until it has ended, and then the next one is the first."""

    async def test() -> None:
        stop = Stop(len(PROMPT), tmp_path)
        async with cluster_of(1, stop.engine) as cluster:
            session_id = await cluster.open(PROMPT)
            step = asyncio.create_task(cluster.decode(session_id, 3))
            await stop.reached()
            step.cancel()
            with pytest.raises(asyncio.CancelledError):
                await step
            assert cluster.tokens(session_id) == PROMPT
            with pytest.raises(SessionBusyError):
                await cluster.decode(session_id)
            stop.go()
            new: list[int] = []
            while not new:
                try:
                    new = await cluster.decode(session_id, 5)
                except SessionBusyError:
                    await asyncio.sleep(0.01)
            assert new == undisturbed(PROMPT, 5)

    run(test())


def test_cancelled_while_all_actors_start(tmp_path: Path) -> None:
    """A step that no longer waits for a new actor leaves the others to wait for it."""

    async def test() -> None:
        async with cluster_of(1) as cluster:
            ids = [await cluster.open(PROMPT) for _ in range(2)]
            await kill_process(await cluster.actor(ids[0]))
            steps = [asyncio.create_task(cluster.decode(session_id, 3)) for session_id in ids]
            while not cluster._starting:  # noqa: ASYNC110  that is the cluster's business
                await asyncio.sleep(0)
            steps[0].cancel()
            assert await steps[1] == undisturbed(PROMPT, 3)
            assert await cluster.decode(ids[0], 3) == undisturbed(PROMPT, 3)

    run(test())


def test_closed_in_mid_step(tmp_path: Path) -> None:
    """Closing cancels: the step ends with the library's error, and the actor has freed the session."""

    async def test() -> None:
        stop = Stop(len(PROMPT) + 2, tmp_path)
        async with cluster_of(1, stop.engine) as cluster:
            session_id = await cluster.open(PROMPT)
            actor = await cluster.actor(session_id)
            step = asyncio.create_task(cluster.decode(session_id, 300))
            await stop.reached()
            await cluster.close(session_id)
            assert await held(actor) == set()
            stop.go()
            with pytest.raises(SessionClosedError) as caught:
                await step
            assert caught.value.session_id == session_id
            assert await held(actor) == set()

    run(test())


def test_closed_while_its_actor_is_dead(tmp_path: Path) -> None:
    """Closing does not need the actor, and no other actor gets a conversation that was closed."""

    async def test() -> None:
        stop = Stop(len(PROMPT) + 2, tmp_path)
        async with cluster_of(2, stop.engine) as cluster:
            session_id = await cluster.open(PROMPT)
            step = asyncio.create_task(cluster.decode(session_id, 300))
            await stop.reached()
            await kill_process(await cluster.actor(session_id))
            await cluster.close(session_id)
            with pytest.raises((ActorDiedError, SessionClosedError)):
                await step

    run(test())


def test_demo() -> None:
    """The program kills two actors and finds that nobody can tell; it does so on this machine alone."""
    done = subprocess.run(
        [sys.executable, DEMO, "--random", "--max-tokens", "12"],
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "SIGKILL" in done.stdout
    assert done.stdout.count("exactly as undisturbed") == 4
    assert SENTENCE in done.stdout
