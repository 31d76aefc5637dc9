"""The paged engine: that blocks are shared never shows in a session's tokens, and none gets lost."""

from __future__ import annotations

import gc
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.batching import Batching, EngineWithBatches
from tests.serving import OTHER, PROMPT, VOCAB_SIZE, Serving, answer, decode, look

import paged_engine
from inference_session import Session
from inference_session.exceptions import SessionBusyError, SessionClosedError
from inference_session.testing import parametrize_with_checks
from llama_model import Floats, Llama, random_model
from numpy_llama import LlamaEngine
from paged_engine import BlockPool, BlockTable, PagedEngine


MODEL = random_model(1, vocab_size=VOCAB_SIZE, context_length=200)
SIZE = 4


@pytest.fixture
def engine() -> Iterator[PagedEngine]:
    """Give an engine, and check in the end that its pool is whole."""
    engine = PagedEngine(MODEL, num_blocks=120, block_size=SIZE, chunk=16)
    yield engine
    gc.collect()
    assert engine.pool.held == 0
    check_books(engine.pool, [])


def check_books(pool: BlockPool, tables: Sequence[BlockTable]) -> None:
    """Require that each block is counted for each table that has it, and is free if none has.

    Between borrows a table has just the blocks that it needs, each under its own key or none.
    """
    held = Counter(block for table in tables for block in table.blocks)
    assert pool.held == len(held)
    assert pool._references == [held[block] for block in range(pool.num_blocks)]
    assert sorted([*pool._free, *held]) == list(range(pool.num_blocks))
    assert {block: key for key, block in pool._published.items()} == pool._keys
    for table in tables:
        assert len(table.blocks) == pool.blocks_for(table.length)
        assert len(table.keys) == table.length // pool.block_size
        for block, key in zip(table.blocks, table.keys, strict=False):
            assert pool._keys.get(block, key) == key


def table_of(engine: PagedEngine, session: Session) -> BlockTable:
    """Return the KV cache of a session."""
    with engine.slots.borrow(session) as state:
        return state.kv_cache


@dataclass(frozen=True, kw_only=True)
class FailingLlama(Llama):
    """Fails before the layers in `failures`, one after another, with everything before written."""

    failures: list[int] = field(default_factory=list[int])

    def _norm(self, x: Floats, weight: Floats) -> Floats:
        for index, layer in enumerate(self.layers):
            if weight is layer.attention_norm and self.failures[:1] == [index]:
                self.failures.pop()
                raise MemoryError(f"in layer {index}")
        return super()._norm(x, weight)


def failing(model: Llama = MODEL) -> FailingLlama:
    """Return a model that can be made to fail."""
    return FailingLlama(**{item.name: getattr(model, item.name) for item in fields(model)})


def fail_after(
    engine: PagedEngine, session: Session, tokens: Sequence[int], error: BaseException
) -> None:
    """Fail a prefill when all of it is computed."""
    with engine.slots.borrow(session) as state:
        state.append(tokens)
        engine._feed_all_but_last(state)
        raise error


@cache
def right_answer(history: tuple[int, ...], count: int) -> list[int]:
    """Return the tokens that the engine with growing caches adds."""
    return answer(LlamaEngine(MODEL), history, count)


# Sessions


class TestServing(Serving):
    """What a session says does not depend on how it is served."""

    def check_reused(self, reused: int, common: int) -> None:
        """Blocks of other sessions count, too."""
        assert reused >= common


@parametrize_with_checks(
    lambda: PagedEngine(random_model(0), num_blocks=160, block_size=4, chunk=8),
    vocab_size=128,
    held=lambda engine: engine.pool.held,
    fail_in=[(Llama, "forward"), (BlockTable, "write"), (BlockPool, "reserve")],
)
def test_engine(check: Callable[[], None]) -> None:
    """The engine keeps a promise."""
    check()


@pytest.mark.parametrize("chunk", [1, 3, 4, 16, 40])
@pytest.mark.parametrize("size", [1, 3, 16, 64])
def test_answers_are_those_of_a_growing_cache(size: int, chunk: int) -> None:
    """Neither blocks nor chunks of any size show in the logits."""
    engine, growing = PagedEngine(MODEL, block_size=size, chunk=chunk), LlamaEngine(MODEL)
    cache = growing.memory.create()
    expected = MODEL.logits(MODEL.forward([(cache, np.array(PROMPT, np.int32))]))
    with Session() as session:
        engine.prefill(session, PROMPT)
        with engine.slots.borrow(session) as state:
            assert np.abs(engine.forward([(state, 1)]) - expected).max() < 1e-3
            engine.settle(state, 1)
    assert answer(engine, OTHER, 20) == answer(growing, OTHER, 20)


@pytest.mark.parametrize("name", ["num_blocks", "block_size", "chunk"])
def test_sizes_are_checked(name: str) -> None:
    """Nothing can be computed with nothing."""
    with pytest.raises(ValueError, match="must be at least 1"):
        PagedEngine(MODEL, **{name: 0})


# Batches


class TestBatching(Batching):
    """A batch changes nothing but the costs, and its blocks are counted right."""

    def check_memory(self, engine: EngineWithBatches, sessions: Sequence[Session]) -> None:
        """Require that each block is counted for the sessions that have it."""
        assert isinstance(engine, PagedEngine)
        check_books(engine.pool, [table_of(engine, session) for session in sessions])


def test_batch_is_all_or_none(engine: PagedEngine) -> None:
    """A session that is busy, closed, empty or listed twice changes nothing for the others."""
    assert engine.decode_batch([]) == []
    with Session() as session, Session() as empty:
        engine.prefill(session, PROMPT)
        before = look(engine, session)
        closed = Session()
        closed.close()
        with pytest.raises(SessionClosedError):
            engine.decode_batch([session, closed])
        with pytest.raises(SessionBusyError):
            engine.decode_batch([session, session])
        with pytest.raises(ValueError, match="session is empty"):
            engine.decode_batch([session, empty])
        assert look(engine, session) == before
        assert decode(engine, session, 3) == answer(engine, PROMPT, 3)


# Sharing


def test_a_common_beginning_is_stored_once(engine: PagedEngine) -> None:
    """Sessions that begin alike share all full blocks of that, and nothing after they part."""
    beginning = PROMPT[: 5 * SIZE]
    prompts = [[*beginning, number, 7, 8, 9, 10, 11] for number in range(8)]
    expected = [answer(engine, prompt, 6) for prompt in prompts]
    sessions = [Session() for _ in prompts]
    for session, prompt in zip(sessions, prompts, strict=True):
        engine.prefill(session, prompt)
    tables = [table_of(engine, session) for session in sessions]
    assert {tuple(table.blocks[:5]) for table in tables} == {tuple(tables[0].blocks[:5])}
    assert engine.pool.held == 5 + 8 * 2
    check_books(engine.pool, tables)
    assert [decode(engine, session, 6) for session in sessions] == expected
    for session in sessions:
        session.close()


def test_a_block_stands_for_what_is_before_it(engine: PagedEngine) -> None:
    """The same tokens after other ones are another block."""
    with Session() as first, Session() as second:
        engine.prefill(first, [*PROMPT[:SIZE], *OTHER[:SIZE], 1])
        engine.prefill(second, [*OTHER[:SIZE], *OTHER[:SIZE], 1])
        assert not {*table_of(engine, first).blocks} & {*table_of(engine, second).blocks}
        expected = answer(LlamaEngine(MODEL), [*OTHER[:SIZE], *OTHER[:SIZE], 1], 8)
        assert decode(engine, second, 8) == expected


@pytest.mark.parametrize("length", [4 * SIZE + 1, 4 * SIZE + 2, 5 * SIZE - 1])
def test_a_shared_block_is_copied_before_it_is_written(engine: PagedEngine, length: int) -> None:
    """Two sessions share a block, are cut in the middle of it, and go on differently."""
    expected = [answer(engine, PROMPT[:length] + tail, 8) for tail in ([1, 2, 3], [4, 5, 6])]
    untouched = answer(engine, PROMPT, 8)
    with Session() as first, Session() as second, Session() as third:
        for session in (first, second, third):
            engine.prefill(session, PROMPT)
        for session in (first, second):
            with engine.slots.borrow(session) as state:
                state.rewind(length, pending=0)
        engine.prefill(first, [1, 2, 3])
        engine.prefill(second, [4, 5, 6])
        check_books(engine.pool, [table_of(engine, one) for one in (first, second, third)])
        assert [decode(engine, session, 8) for session in (first, second)] == expected
        assert decode(engine, third, 8) == untouched


def test_a_block_of_one_session_is_withdrawn_before_it_is_written(engine: PagedEngine) -> None:
    """Cut in the middle of a block, a session writes to it; nobody finds the old tokens there."""
    expected = answer(engine, PROMPT, 8)
    with Session() as session, Session() as other:
        engine.prefill(session, [*PROMPT[:9], 5])
        block = table_of(engine, session).blocks[1]
        with engine.slots.borrow(session) as state:
            state.rewind(6, pending=0)
        engine.prefill(session, [1, 2, 3, 4])
        assert table_of(engine, session).blocks[1] == block
        engine.prefill(other, PROMPT)
        assert table_of(engine, other).blocks[1] != block
        assert decode(engine, other, 8) == expected


def test_a_free_block_is_found_until_it_is_used_again() -> None:
    """A conversation that is over leaves its blocks to the next; those unused longest go first."""
    engine = PagedEngine(MODEL, num_blocks=10, block_size=SIZE)
    with Session() as session:
        assert engine.prompt(session, PROMPT[:17]) == 0
    assert engine.pool.held == 0
    with Session() as session:
        assert engine.prompt(session, PROMPT[:17]) == 4 * SIZE
        assert decode(engine, session, 5) == answer(LlamaEngine(MODEL), PROMPT[:17], 5)
    with Session() as session:
        engine.prefill(session, OTHER[:18])  # takes the five that were never used, ...
    with Session() as session:
        assert engine.prompt(session, PROMPT[:17]) == 4 * SIZE
    with Session() as session:
        engine.prefill(session, [9, *OTHER])  # ... and these are now the oldest
    with Session() as session:
        assert engine.prompt(session, OTHER[:18]) == 0
        assert decode(engine, session, 5) == answer(LlamaEngine(MODEL), OTHER[:18], 5)


def test_a_part_of_a_block_is_given_up_for_all_of_it(engine: PagedEngine) -> None:
    """A session in the middle of a block that another has completed takes that one."""
    expected = answer(engine, PROMPT, 8)
    with Session() as slow, Session() as fast:
        engine.prefill(slow, PROMPT[: 2 * SIZE + 3])
        engine.prefill(fast, PROMPT)
        engine.prefill(slow, PROMPT[2 * SIZE + 3 :])
        shared = (len(PROMPT) - 1) // SIZE
        slow_table, fast_table = table_of(engine, slow), table_of(engine, fast)
        assert slow_table.blocks[:shared] == fast_table.blocks[:shared]
        check_books(engine.pool, [slow_table, fast_table])
        assert decode(engine, slow, 8) == expected


@pytest.mark.parametrize("length", [1, 4 * SIZE, 4 * SIZE + 1, 5 * SIZE - 1, len(PROMPT)])
def test_a_branch_shares_its_blocks(engine: PagedEngine, length: int) -> None:
    """Branches hold nothing of their own until they write, and then at most a block each."""
    growing = LlamaEngine(MODEL)
    expected = [answer(growing, [*PROMPT[:length], number], 6) for number in range(3)]
    with Session() as session:
        engine.prefill(session, PROMPT)
        held = engine.pool.held
        with engine.slots.borrow(session) as state:
            branches = [state.branch(length) for _ in range(3)]
        assert engine.pool.held == held
        tables = [table_of(engine, one) for one in (session, *branches)]
        assert [table.length for table in tables[1:]] == [length - 1] * 3
        check_books(engine.pool, tables)
        for number, branch in enumerate(branches):
            engine.prefill(branch, [number])
        assert engine.pool.held <= held + 3
        check_books(engine.pool, tables)
        assert [decode(engine, branch, 6) for branch in branches] == expected
        assert decode(engine, session, 6) == answer(growing, PROMPT, 6)
        for branch in branches:
            branch.close()


# Room


def test_a_prompt_longer_than_the_pool_is_refused() -> None:
    """It could never be computed, so nothing is begun, and the session stays as it was."""
    engine = PagedEngine(MODEL, num_blocks=10, block_size=SIZE)
    with Session() as session:
        engine.prefill(session, PROMPT[:38])
        with pytest.raises(ValueError, match="41 tokens do not fit in a pool of 40"):
            engine.prefill(session, [1, 2, 3])
        with pytest.raises(ValueError, match="42 tokens do not fit in a pool of 40"):
            engine.prompt(session, [*PROMPT, 1, 2])
        assert look(engine, session) == (PROMPT[:38], 37)
        decode(engine, session, 2)
        with pytest.raises(ValueError, match="41 tokens do not fit in a pool of 40"):
            engine.decode(session)
        assert session.token_count == 40
    with pytest.raises(ValueError, match="201 tokens do not fit in a context of 200"):
        PagedEngine(MODEL).prefill(Session(), [1] * 201)


def test_a_full_pool_fails_a_step_and_evicting_makes_room() -> None:
    """A batch that needs more blocks than are free changes nothing, and can be tried again."""
    engine = PagedEngine(MODEL, num_blocks=10, block_size=SIZE)
    expected = [answer(LlamaEngine(MODEL), prompt, 2) for prompt in (PROMPT[:20], OTHER[:20])]
    with Session() as first, Session() as second:
        engine.prefill(first, PROMPT[:20])
        engine.prefill(second, OTHER[:20])
        tokens = [result.token for result in engine.decode_batch([first, second])]
        tables = [table_of(engine, first), table_of(engine, second)]
        before = [list(table.blocks) for table in tables]
        with pytest.raises(MemoryError, match="2 more blocks are needed, and 0 of the pool's 10"):
            engine.decode_batch([first, second])
        assert [table.blocks for table in tables] == before
        check_books(engine.pool, tables)
        engine.slots.evict(second)
        assert [tokens[0], engine.decode(first).token] == expected[0]
        engine.slots.evict(first)
        assert [tokens[1], engine.decode(second).token] == expected[1]
    assert engine.pool.held == 0


def test_a_copy_needs_room_as_well() -> None:
    """A branch that must copy a block fails before anything is written, if none is free."""
    engine = PagedEngine(MODEL, num_blocks=5, block_size=SIZE)
    with Session() as session:
        engine.prefill(session, PROMPT[:18])
        with engine.slots.borrow(session) as state:
            branch = state.branch()
        tables = [table_of(engine, session), table_of(engine, branch)]
        with pytest.raises(MemoryError, match="1 more blocks are needed, and 0 of"):
            engine.decode(branch)
        check_books(engine.pool, tables)
        engine.slots.evict(session)
        assert decode(engine, branch, 2) == right_answer(tuple(PROMPT[:18]), 2)
        branch.close()


def test_nbytes_are_those_of_the_blocks(engine: PagedEngine) -> None:
    """A budget counts what a session holds, in blocks."""
    with Session() as session:
        engine.prefill(session, PROMPT[: 3 * SIZE + 2])
        assert engine.slots.nbytes is not None
        nbytes = engine.slots.nbytes(table_of(engine, session))
        assert nbytes == 4 * engine.pool.layers.nbytes // engine.pool.num_blocks


# Failures


@pytest.mark.parametrize("layer", range(3))
def test_a_failed_pass_publishes_nothing(layer: int) -> None:
    """Half-written blocks are found by nobody, and the sessions of the batch stay as they were."""
    model = failing()
    engine = PagedEngine(model, num_blocks=60, block_size=SIZE)
    with Session() as first, Session() as second, Session() as third:
        for session, prompt in ((first, PROMPT), (second, OTHER)):
            engine.prefill(session, prompt)
        before = [look(engine, session) for session in (first, second)]
        published = dict(engine.pool._published)
        model.failures.append(layer)
        with pytest.raises(MemoryError, match=f"in layer {layer}"):
            engine.prefill(third, PROMPT[::-1])
        model.failures.append(layer)
        with pytest.raises(MemoryError, match=f"in layer {layer}"):
            engine.decode_batch([first, second])
        assert engine.pool._published == published
        assert third.token_count == 0
        assert [look(engine, session) for session in (first, second)] == before
        check_books(engine.pool, [table_of(engine, session) for session in (first, second)])
        engine.prefill(third, PROMPT[::-1])
        for session, prompt in ((first, PROMPT), (second, OTHER), (third, PROMPT[::-1])):
            assert decode(engine, session, 10) == answer(LlamaEngine(MODEL), prompt, 10)


def test_a_block_published_in_a_step_that_is_rolled_back_is_right(engine: PagedEngine) -> None:
    """Its tokens are gone from that session; for a session that has them, it holds what it should."""
    with Session() as session, Session() as other:
        with pytest.raises(KeyboardInterrupt):
            fail_after(engine, session, PROMPT, KeyboardInterrupt())
        assert look(engine, session) == ([], 0)
        assert engine.prompt(other, PROMPT) == (len(PROMPT) - 1) // SIZE * SIZE
        assert decode(engine, other, 10) == answer(LlamaEngine(MODEL), PROMPT, 10)


# The end of a block is an event in the line of its `with`, where no signal is ever delivered.
SOURCE = Path(paged_engine.__file__).read_text().splitlines()
WITHS = {number for number, line in enumerate(SOURCE, 1) if line.lstrip().startswith("with ")}


class Interrupt:
    """Raises KeyboardInterrupt before a line of the pool's code, counted from the beginning."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __enter__(self) -> Self:
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_qualname.startswith("BlockPool.") else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line" and frame.f_lineno not in WITHS:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self._line


def use_all_of_the_pool(engine: PagedEngine, first: Session, second: Session) -> None:
    """Do all that a pool is for."""
    engine.prefill(first, PROMPT[:14])
    engine.prefill(second, PROMPT[:14])  # Takes three blocks.
    with engine.slots.borrow(first) as state:
        state.rewind(2, pending=0)  # Gives back two of them.
        branch = state.branch()
    engine.prefill(branch, [1, 2])  # Copies the third.
    engine.prefill(second, OTHER[:9])
    with engine.slots.borrow(second) as state:
        state.rewind(18, pending=0)
    engine.prefill(second, [4, 5, 6])  # Withdraws a block.
    branch.close()
    engine.decode_batch([first, second])


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # a branch that an interrupt took away
def test_an_interrupt_anywhere_in_the_pool_never_makes_a_token_wrong() -> None:
    """Before each line of it, one after another: blocks may be lost, but none is in use twice."""
    line, left = 0, 0
    while left == 0:
        line += 1
        engine = PagedEngine(MODEL, num_blocks=30, block_size=SIZE, chunk=5)
        sessions = [Session(), Session()]
        with suppress(KeyboardInterrupt), Interrupt(line) as interrupt:
            use_all_of_the_pool(engine, *sessions)
        left = interrupt.left
        tables = [table_of(engine, session) for session in sessions]
        held = {*chain(*(table.blocks for table in tables))}
        assert engine.pool.held >= len(held)
        assert not engine.pool._free.keys() & held
        for session in sessions:
            history, _ = look(engine, session)
            engine.prefill(session, [7])
            assert decode(engine, session, 4) == right_answer((*history, 7), 4)
        for prompt in ([*PROMPT[:14], *OTHER[:9]], PROMPT[:8]):
            assert answer(engine, prompt, 4) == right_answer(tuple(prompt), 4)
        for session in sessions:
            session.close()
    assert line > 200


def test_release_never_waits(engine: PagedEngine) -> None:
    """The garbage collector may end a session, or a step, while this very thread has the lock."""
    session, stepped = Session(), Session()
    engine.prefill(session, PROMPT)

    def step() -> Iterator[None]:
        with engine.slots.borrow(stepped) as state:
            state.append(OTHER)
            engine._feed_all_but_last(state)
            yield

    steps = step()
    next(steps)
    with engine.pool._lock:
        session.close()
        del steps
        gc.collect()
    assert engine.pool.held == 0
    stepped.close()


class CountingLock:
    """Counts how often it is taken."""

    def __init__(self) -> None:
        self.taken = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self.taken += 1
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_the_books_are_changed_under_the_lock(
    engine: PagedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What looks at blocks or counts them takes the lock, once; what gives them back does not."""
    pool, lock = engine.pool, CountingLock()
    monkeypatch.setattr(pool, "_lock", lock)
    table = pool.create()
    taking: list[Callable[[], object]] = [
        lambda: pool.reserve([(table, 8)]),
        lambda: pool.publish(table, PROMPT),
        lambda: pool.reuse(table, PROMPT),
        lambda: pool.share(table, 0),
        lambda: pool.held,
    ]
    for number, use in enumerate(taking, 1):
        use()
        assert lock.taken == number
    pool.truncate(table, 0)
    pool.nbytes(table)
    pool.release(table)
    assert lock.taken == len(taking)


def test_threads_share_a_pool(engine: PagedEngine) -> None:
    """Sessions that share blocks are stepped by threads at once, some of them failing and evicted."""
    prompts = [PROMPT[: 8 + number % 20] for number in range(24)]
    growing = LlamaEngine(MODEL)
    expected = [answer(growing, prompt, 12) for prompt in prompts]

    def serve(number: int) -> list[int]:
        tokens: list[int] = []
        with Session() as session:
            engine.prefill(session, prompts[number])
            for step in range(12):
                if (number + step) % 5 == 0:
                    engine.slots.evict(session)
                if (number + step) % 7 == 0:
                    with pytest.raises(KeyError):
                        fail_after(engine, session, OTHER, KeyError())
                tokens.append(engine.decode(session).token)
        return tokens

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(serve, range(24))) == expected


# Anything


FEW_TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple)
OPERATIONS = st.one_of(
    st.tuples(st.just("prefill"), FEW_TOKENS),
    st.tuples(st.just("decode"), st.none()),
    st.tuples(st.just("rewind"), st.integers(0, 40)),
    st.tuples(st.just("evict"), st.none()),
    st.tuples(st.just("close"), st.none()),
    st.tuples(st.just("fail"), st.integers(0, 2)),
    st.tuples(st.just("batch"), st.integers(0, 3)),
    st.tuples(st.just("branch"), st.integers(0, 40)),
)


class Machine:
    """Any sessions over a pool that is often full, and what their histories should be."""

    def __init__(self) -> None:
        self.model = failing()
        self.engine = PagedEngine(self.model, num_blocks=14, block_size=SIZE, chunk=5)
        self.sessions = [Session() for _ in range(4)]
        self.histories: list[list[int]] = [[] for _ in range(4)]

    def run(self, number: int, operation: str, argument: object) -> None:
        """Do something to a session, and check all that can be seen."""
        session, history = self.sessions[number], self.histories[number]
        with suppress(MemoryError, ValueError):
            getattr(self, operation)(number, session, history, argument)
        self.model.failures.clear()
        tables: list[BlockTable] = []
        for one, expected in zip(self.sessions, self.histories, strict=True):
            with self.engine.slots.borrow(one) as state:
                assert list(state.token_history) == expected
                tables.append(state.kv_cache)
        check_books(self.engine.pool, tables)

    def prefill(
        self, number: int, session: Session, history: list[int], tokens: Sequence[int]
    ) -> None:
        """Prefill, if there is room."""
        self.engine.prefill(session, tokens)
        history += tokens

    def decode(self, number: int, session: Session, history: list[int], _: object) -> None:
        """Decode, if there is room."""
        token = self.engine.decode(session).token
        assert token == right_answer(tuple(history), 1)[0]
        history.append(token)

    def rewind(self, number: int, session: Session, history: list[int], length: int) -> None:
        """Forget some tokens, and leave none pending if possible."""
        with self.engine.slots.borrow(session) as state:
            state.rewind(min(length, len(history)), pending=0)
        del history[length:]

    def evict(self, number: int, session: Session, history: list[int], _: object) -> None:
        """Evict."""
        self.engine.slots.evict(session)

    def close(self, number: int, session: Session, history: list[int], _: object) -> None:
        """Close, and begin another session."""
        session.close()
        self.sessions[number], self.histories[number] = Session(), []

    def fail(self, number: int, session: Session, history: list[int], layer: int) -> None:
        """Decode with a model that fails half-way."""
        self.model.failures.append(layer)
        self.decode(number, session, history, None)

    def branch(self, number: int, session: Session, history: list[int], length: int) -> None:
        """Let the next session be a branch of this one."""
        with self.engine.slots.borrow(session) as state:
            branch = state.branch(min(length, len(history)))
        other = (number + 1) % 4
        self.sessions[other].close()
        self.sessions[other], self.histories[other] = branch, history[:length]

    def batch(self, number: int, session: Session, history: list[int], count: int) -> None:
        """Decode some sessions at once."""
        some = [*range(number, 4), *range(number)][: count + 1]
        results = self.engine.decode_batch([self.sessions[one] for one in some])
        for one, result in zip(some, results, strict=True):
            assert result.token == right_answer(tuple(self.histories[one]), 1)[0]
            self.histories[one].append(result.token)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 3), OPERATIONS), max_size=40))
def test_any_calls(calls: list[tuple[int, tuple[str, object]]]) -> None:
    """Whatever sessions do over few blocks and tokens, answers are right and the books are true."""
    machine = Machine()
    for number, (operation, argument) in calls:
        machine.run(number, operation, argument)
    for session in machine.sessions:
        session.close()
    check_books(machine.engine.pool, [])
