"""The scheduler: requests get what they would get alone, and whatever ends one leaves the others be."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serving import OTHER, PROMPT, PROMPTS, VOCAB_SIZE, answer, look

from inference_session import Session
from inference_session.exceptions import SessionBusyError, SessionClosedError
from llama_model import Batch, Floats, Llama, random_model
from numpy_llama import LlamaEngine, sampling
from paged_engine import PagedEngine
from paged_scheduler import Scheduler


MODEL = random_model(1, vocab_size=VOCAB_SIZE, context_length=200)
GROWING = LlamaEngine(MODEL)


@dataclass(frozen=True, kw_only=True)
class WatchedLlama(Llama):
    """Notes the tokens of each pass, fails if one is poison, and can be held up."""

    passes: list[list[list[int]]] = field(default_factory=list[list[list[int]]])
    begun: threading.Event = field(default_factory=threading.Event)
    may_end: threading.Event = field(default_factory=threading.Event)
    poison: set[int] = field(default_factory=set[int])

    def forward(self, batch: Batch) -> Floats:
        """Compute, and then fail or not."""
        self.passes.append([tokens.tolist() for _, tokens in batch])
        self.begun.set()
        assert self.may_end.wait(60)
        hidden = super().forward(batch)
        if any(self.poison.intersection(tokens.tolist()) for _, tokens in batch):
            raise ArithmeticError("poison")
        return hidden


class Watched(Scheduler):
    """Counts what lost its KV cache, and notes what began, or began again."""

    def __init__(self, engine: PagedEngine, *, max_running: int = 32) -> None:
        super().__init__(engine, max_running=max_running)
        self.evicted = 0
        self.begun: list[Session] = []

    def _go_on(self, request: Any, step: Any, value: Any) -> None:
        if step is next:
            self.begun.append(request.session)
        super()._go_on(request, step, value)

    def _evict(self, session: Session) -> bool:
        self.evicted += 1
        return super()._evict(session)


def new_engine(num_blocks: int = 200) -> tuple[PagedEngine, WatchedLlama]:
    """Return an engine over a watched model."""
    model = WatchedLlama(**{item.name: getattr(MODEL, item.name) for item in fields(MODEL)})
    model.may_end.set()
    return PagedEngine(model, num_blocks=num_blocks, block_size=4, chunk=16), model


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run a test; one that hangs is ended by faulthandler."""
    asyncio.run(test)


async def collect(tokens: AsyncIterator[int]) -> list[int]:
    """Return all tokens of a request."""
    return [token async for token in tokens]


def test_requests_get_what_they_would_get_alone() -> None:
    """Requests of all lengths at once, more than may run, over a pool that has room for all."""
    lengths = [1 + 3 * number for number in range(12)]
    prompts = [PROMPTS[number % 4] for number in range(12)]

    async def test() -> None:
        engine, model = new_engine()
        async with Scheduler(engine, max_running=5) as scheduler:
            requests = map(scheduler.submit, prompts, lengths)
            answers = await asyncio.gather(*map(collect, requests))
        assert answers == [answer(GROWING, *one) for one in zip(prompts, lengths, strict=True)]
        assert max(map(len, model.passes)) == 5
        assert engine.pool.held == 0

    run(test())


def test_requests_join_between_passes() -> None:
    """A request that comes later is in a batch with one that is under way, and leaves it first."""

    async def test() -> None:
        engine, model = new_engine()
        async with Scheduler(engine) as scheduler:
            first = scheduler.submit(PROMPT, 40)
            tokens = [await anext(first)]
            assert await collect(scheduler.submit(OTHER, 5)) == answer(GROWING, OTHER, 5)
            tokens += await collect(first)
        assert tokens == answer(GROWING, PROMPT, 40)
        sizes = [len(fed) for fed in model.passes]
        assert (sizes[0], max(sizes), sizes[-1]) == (1, 2, 1)

    run(test())


def test_a_long_prompt_is_fed_beside_others() -> None:
    """While a prompt is fed in chunks, each pass adds a token to a request that is decoding."""

    async def test() -> None:
        engine, model = new_engine()
        async with Scheduler(engine) as scheduler:
            first = scheduler.submit([7], 30)
            tokens = [await anext(first)]
            assert await collect(scheduler.submit(PROMPT, 1)) == answer(GROWING, PROMPT, 1)
            tokens += await collect(first)
        assert tokens == answer(GROWING, [7], 30)
        assert [*map(len, next(fed for fed in model.passes if len(fed) == 2))] == [1, 16]

    run(test())


def test_a_common_beginning_is_computed_once() -> None:
    """Requests that come at once and begin alike wait for the first to have computed that."""

    async def test() -> None:
        engine, model = new_engine()
        prompts = [[*PROMPT[:32], number] for number in range(8)]
        async with Scheduler(engine) as scheduler:
            answers = await asyncio.gather(
                *(collect(scheduler.submit(prompt, 3)) for prompt in prompts)
            )
        assert answers == [answer(GROWING, prompt, 3) for prompt in prompts]
        assert sum(len(tokens) for fed in model.passes for tokens in fed) == 32 + 8 * 3

    run(test())


def test_options() -> None:
    """A request has a sampler and tokens to stop at of its own."""
    expected = answer(GROWING, PROMPT, 20)
    sample = sampling(temperature=2.0, seed=3)

    async def test() -> None:
        engine, _ = new_engine()
        async with Scheduler(engine) as scheduler:
            stopped, drawn, again = await asyncio.gather(
                collect(scheduler.submit(PROMPT, 20, stop={expected[4]})),
                collect(scheduler.submit(PROMPT, 20, sample=sample)),
                collect(scheduler.submit(PROMPT, 20, sample=sample)),
            )
        assert stopped == expected[: expected.index(expected[4]) + 1]
        assert drawn == again != expected

    run(test())


# A session of the client


def test_a_conversation_goes_on() -> None:
    """A client's own session stays open, and the next request goes on from its KV cache."""

    async def test() -> None:
        engine, model = new_engine()
        async with Scheduler(engine) as scheduler:
            with Session() as session:
                first = await collect(scheduler.submit(PROMPT, 5, session=session))
                model.passes.clear()
                second = await collect(scheduler.submit([1, 2], 5, session=session))
                more = await collect(scheduler.submit([], 5, session=session))
                assert look(engine, session)[0] == [*PROMPT, *first, 1, 2, *second, *more]
        assert first == answer(GROWING, PROMPT, 5)
        assert second + more == answer(GROWING, [*PROMPT, *first, 1, 2], 10)
        assert model.passes[0] == [[first[-1], 1, 2]]
        assert engine.pool.held == 0

    run(test())


def test_a_session_that_is_fully_covered() -> None:
    """With nothing pending and nothing to add, the last token is fed again."""

    async def test() -> None:
        engine, _ = new_engine()
        with Session() as session:
            engine.prefill(session, PROMPT)
            with engine.slots.borrow(session) as state:
                state.rewind(len(PROMPT) - 1, pending=0)
            async with Scheduler(engine) as scheduler:
                tokens = await collect(scheduler.submit([], 5, session=session))
        assert tokens == answer(GROWING, PROMPT[:-1], 5)

    run(test())


# Room


@pytest.mark.parametrize("num_blocks", [20, 24, 40])
def test_preempted_requests_get_what_they_would_get_alone(num_blocks: int) -> None:
    """A pool too small for all makes requests wait and be computed anew, and nothing else."""
    prompts = [[*PROMPTS[number % 4][:20], number] for number in range(10)]

    async def test() -> None:
        engine, _ = new_engine(num_blocks)
        async with Watched(engine, max_running=6) as scheduler:
            answers = await asyncio.gather(
                *(collect(scheduler.submit(prompt, 40)) for prompt in prompts)
            )
            assert scheduler.evicted > 0
        assert answers == [answer(GROWING, prompt, 40) for prompt in prompts]
        assert engine.pool.held == 0

    run(test())


def test_a_preempted_request_goes_first() -> None:
    """It began before those that wait, so none of them overtakes it."""

    async def test() -> None:
        engine, _ = new_engine(num_blocks=20)
        sessions = [Session() for _ in range(3)]
        async with Watched(engine, max_running=2) as scheduler:
            await asyncio.gather(
                *(
                    collect(scheduler.submit([number] * 21, 40 - 10 * number, session=session))
                    for number, session in enumerate(sessions)
                )
            )
            assert scheduler.evicted > 0
            begun = [sessions.index(session) for session in scheduler.begun]
        assert begun == sorted(begun)
        assert begun.count(1) > 1
        for session in sessions:
            session.close()

    run(test())


def test_the_session_idle_longest_is_evicted_first() -> None:
    """Idle conversations lose their KV caches before a running request does, the oldest first."""

    async def test() -> None:
        engine, _ = new_engine(num_blocks=20)
        sessions = [Session() for _ in range(3)]
        async with Watched(engine) as scheduler:
            for number, session in enumerate(sessions):
                await collect(scheduler.submit([number] * 17, 3, session=session))
            await collect(scheduler.submit([7], 1, session=sessions[0]))
            assert engine.pool.held == 3 * 5 + 1
            assert await collect(scheduler.submit(OTHER, 3)) == answer(GROWING, OTHER, 3)
            assert scheduler.evicted == 1
        assert [look(engine, session)[1] for session in sessions] == [21, 0, 19]
        for session in sessions:
            session.close()

    run(test())


def test_a_request_that_never_fits_is_refused() -> None:
    """A prompt longer than the pool is an error of its own, and the others go on."""

    async def test() -> None:
        engine, _ = new_engine(num_blocks=20)
        async with Scheduler(engine) as scheduler:
            long = collect(scheduler.submit([1] * 81, 1))
            growing = collect(scheduler.submit([1] * 70, 40))
            other = collect(scheduler.submit(OTHER, 10))
            refused, full, tokens = await asyncio.gather(
                long, growing, other, return_exceptions=True
            )
        assert "82 tokens do not fit in a pool of 80" in str(refused)
        assert "81 tokens do not fit in a pool of 80" in str(full)
        assert tokens == answer(GROWING, OTHER, 10)
        assert engine.pool.held == 0

    run(test())


def test_a_pool_held_by_others_fails_a_request() -> None:
    """Blocks of sessions that the scheduler doesn't know of are not its to take."""

    async def test() -> None:
        engine, _ = new_engine(num_blocks=20)
        with Session() as stranger:
            engine.prefill(stranger, [1] * 70)
            async with Scheduler(engine) as scheduler:
                with pytest.raises(MemoryError, match="6 more blocks are needed, and 2 of"):
                    await collect(scheduler.submit(OTHER, 1))
                assert await collect(scheduler.submit([5], 3)) == answer(GROWING, [5], 3)

    run(test())


# What ends a request


def test_a_client_that_leaves_is_alone() -> None:
    """Closing the iterator ends a request; so does cancelling the task; the others don't notice."""

    async def test() -> None:
        engine, model = new_engine()
        expected = answer(GROWING, PROMPT, 30)
        async with Scheduler(engine) as scheduler:
            with Session() as session:
                staying = asyncio.create_task(collect(scheduler.submit(OTHER, 60)))
                leaving = scheduler.submit(PROMPT, 100, session=session)
                assert [await anext(leaving) for _ in range(3)] == expected[:3]
                await leaving.aclose()
                cancelled = asyncio.create_task(collect(scheduler.submit(PROMPT, 100)))
                model.begun.clear()
                await asyncio.to_thread(model.begun.wait)
                cancelled.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await cancelled
                assert await staying == answer(GROWING, OTHER, 60)
                history, _ = look(engine, session)  # All that was decoded until it left.
                assert history[: len(PROMPT) + 3] == PROMPT + expected[:3]
                count = len(history) - len(PROMPT)
                assert history == PROMPT + answer(GROWING, PROMPT, count)
        assert engine.pool.held == 0

    run(test())


def test_a_client_that_leaves_before_the_first_token() -> None:
    """Until there is a token, leaving takes back the prompt as well."""

    async def test() -> None:
        engine, model = new_engine()
        with Session() as session:
            engine.prefill(session, OTHER)
            before = look(engine, session)
            model.begun.clear()
            model.may_end.clear()
            async with Scheduler(engine) as scheduler:
                waiting = asyncio.create_task(collect(scheduler.submit(PROMPT, 5, session=session)))
                assert await asyncio.to_thread(model.begun.wait, 60)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                assert session.borrowed  # The pass is under way: it ends first.
                model.may_end.set()
                assert await collect(scheduler.submit([3], 2)) == answer(GROWING, [3], 2)
                assert look(engine, session) == before

    run(test())


def test_a_request_cancelled_while_it_waits_never_begins() -> None:
    """Nothing of it is computed, and its session is as it was."""

    async def test() -> None:
        engine, model = new_engine()
        with Session() as session:
            async with Scheduler(engine, max_running=1) as scheduler:
                running = scheduler.submit(OTHER, 20)
                await anext(running)
                waiting = asyncio.create_task(
                    collect(scheduler.submit([88] * 8, 5, session=session))
                )
                model.begun.clear()
                await asyncio.to_thread(model.begun.wait)
                waiting.cancel()
                await collect(running)
                with pytest.raises(asyncio.CancelledError):
                    await waiting
            assert session.token_count == 0
        assert not any(88 in tokens for fed in model.passes for tokens in fed)

    run(test())


def test_errors_are_those_of_their_request() -> None:
    """Bad tokens, a busy session, a sampler that fails: each is its own client's error."""

    def failing(logits: Floats, position: int) -> int:
        if position == len(OTHER) + 3:
            raise KeyError("sampler")
        return int(logits.argmax())

    async def test() -> None:
        engine, _ = new_engine()
        with Session() as session, Session() as busy, engine.slots.borrow(busy):
            async with Scheduler(engine) as scheduler:
                *errors, tokens = await asyncio.gather(
                    collect(scheduler.submit([1, VOCAB_SIZE], 5)),
                    collect(scheduler.submit([1], 5, session=busy)),
                    collect(scheduler.submit([], 5)),
                    collect(scheduler.submit(OTHER, 9, session=session, sample=failing)),
                    collect(scheduler.submit(PROMPT, 30)),
                    return_exceptions=True,
                )
            kinds = [ValueError, SessionBusyError, ValueError, KeyError]
            assert [type(error) for error in errors] == kinds
            assert tokens == answer(GROWING, PROMPT, 30)
            assert look(engine, session)[0] == OTHER + answer(GROWING, OTHER, 3)
        assert engine.pool.held == 0

    run(test())


def test_a_pass_that_fails_finds_the_request_at_fault() -> None:
    """The model fails on one request's tokens, after it wrote all: the others get their tokens."""

    async def test() -> None:
        engine, model = new_engine()
        expected = [answer(GROWING, prompt, 12) for prompt in PROMPTS]
        poison = min({*range(VOCAB_SIZE)}.difference(*PROMPTS, *expected))
        model.poison.add(poison)
        prompts = [*PROMPTS, [5, poison, 6]]
        async with Scheduler(engine) as scheduler:
            *answers, error = await asyncio.gather(
                *(collect(scheduler.submit(prompt, 12)) for prompt in prompts),
                return_exceptions=True,
            )
            assert isinstance(error, ArithmeticError)
            assert answers == expected
        assert engine.pool.held == 0

    run(test())


def test_a_session_closed_in_mid_request() -> None:
    """Closing a session from anywhere ends its request with that error, and frees its blocks."""

    async def test() -> None:
        engine, _ = new_engine()
        session = Session()
        async with Scheduler(engine) as scheduler:
            tokens = scheduler.submit(PROMPT, 100, session=session)
            await anext(tokens)
            session.close()
            with pytest.raises(SessionClosedError):
                await collect(tokens)
            assert engine.pool.held == 0

    run(test())


# The end of the scheduler


def test_a_scheduler_that_ends_ends_its_requests() -> None:
    """Clients that still wait get an error, once the pass under way is over."""

    async def test() -> None:
        engine, model = new_engine()
        session = Session()
        async with Scheduler(engine, max_running=1) as scheduler:
            model.begun.clear()
            model.may_end.clear()
            running = asyncio.create_task(collect(scheduler.submit(PROMPT, 5, session=session)))
            waiting = asyncio.create_task(collect(scheduler.submit(OTHER, 5)))
            assert await asyncio.to_thread(model.begun.wait, 60)
            borrowed: list[bool] = []
            asyncio.get_running_loop().call_later(0.01, lambda: borrowed.append(session.borrowed))
            asyncio.get_running_loop().call_later(0.02, model.may_end.set)
        assert borrowed == [True]
        for task in (running, waiting):
            with pytest.raises(RuntimeError, match="the scheduler has ended"):
                await task
        assert not session.borrowed
        assert session.token_count == 0
        with pytest.raises(RuntimeError, match="isn't running"):
            await collect(scheduler.submit(PROMPT, 1))
        session.close()
        assert engine.pool.held == 0

    run(test())


def test_submit_outside_of_the_block() -> None:
    """A scheduler that was never entered says so; so does a request for nothing."""

    async def test() -> None:
        engine, _ = new_engine()
        with pytest.raises(RuntimeError, match="async with"):
            await collect(Scheduler(engine).submit(PROMPT, 1))
        async with Scheduler(engine) as scheduler:
            with pytest.raises(ValueError, match="max_new must be at least 1"):
                await collect(scheduler.submit(PROMPT, 0))

    run(test())


# Anything


@settings(deadline=None, max_examples=40)
@given(
    st.integers(10, 40),
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), min_size=1, max_size=20),
            st.integers(1, 18),
            st.sampled_from(["stay", "stay", "leave", "fail"]),
            st.integers(1, 6),
        ),
        max_size=12,
    ),
)
def test_any_requests(num_blocks: int, requests: Sequence[tuple[list[int], int, str, int]]) -> None:
    """Whatever the others do, and however small the pool: a client's tokens are what they should be."""

    async def client(
        scheduler: Scheduler, prompt: list[int], count: int, does: str, at: int
    ) -> None:
        expected = answer(GROWING, prompt, count)

        def sample(logits: Floats, position: int) -> int:
            if does == "fail" and position == len(prompt) + at:
                raise KeyError
            return int(logits.argmax())

        got: list[int] = []
        try:
            async with aclosing(scheduler.submit(prompt, count, sample=sample)) as tokens:
                async for token in tokens:
                    got.append(token)
                    if does == "leave" and len(got) == at:
                        break
        except KeyError:
            assert does == "fail"
        length = count if does == "stay" else min(count, at)
        assert got == expected[:length]

    async def test() -> None:
        engine, _ = new_engine(num_blocks)
        async with Scheduler(engine, max_running=4) as scheduler:
            await asyncio.gather(*(client(scheduler, *request) for request in requests))
        gc.collect()
        assert engine.pool.held == 0

    run(test())
