"""What the tests of all engines have in common: prompts, steps, and that how a session is served never shows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
import pytest

from inference_session import Session
from inference_session.engine import Engine, StateSlots


VOCAB_SIZE = 128
PROMPT: list[int] = np.random.default_rng(7).integers(0, VOCAB_SIZE, 40).tolist()
OTHER: list[int] = np.random.default_rng(8).integers(0, VOCAB_SIZE, 23).tolist()
PROMPTS = [PROMPT, OTHER, PROMPT[:1], OTHER[:5] + PROMPT]


class EngineWithSlots(Engine, Protocol):
    """An engine as all in docs/engines are."""

    @property
    def slots(self) -> StateSlots[Any]:
        """Its access to sessions."""
        ...

    def prompt(self, session: Session, tokens: Sequence[int], /) -> int:
        """Make `tokens` the whole history; return how many of them the KV cache had already."""
        ...


def decode(engine: Engine, session: Session, count: int) -> list[int]:
    """Decode some tokens, one by one."""
    return [engine.decode(session).token for _ in range(count)]


def answer(engine: Engine, prompt: Sequence[int], count: int) -> list[int]:
    """Decode some tokens in a session of their own that nothing disturbs."""
    with Session() as session:
        engine.prefill(session, prompt)
        return decode(engine, session, count)


def look(engine: EngineWithSlots, session: Session) -> tuple[list[int], int]:
    """Return a session's history, and how much of it is cached."""
    with engine.slots.borrow(session) as state:
        return list(state.token_history), state.kv_length


class Serving:
    """What a session says does not depend on how it is served: tests, which are given an `engine`."""

    def test_cached_decode_is_full_recompute(self, engine: EngineWithSlots) -> None:
        """Nothing is lost when the KV cache is thrown away, before each and every step."""
        with Session() as session:
            engine.prefill(session, PROMPT)
            tokens: list[int] = []
            for _ in range(15):
                engine.slots.evict(session)
                tokens.append(engine.decode(session).token)
        assert tokens == answer(engine, PROMPT, 15)
        assert len(set(tokens)) > 5

    def test_interleaved_sessions_do_not_see_each_other(self, engine: Engine) -> None:
        """Sessions whose steps alternate each get what they would get alone."""
        alone = [answer(engine, prompt, 15) for prompt in PROMPTS]
        with ExitStack() as closing:
            sessions = [closing.enter_context(Session()) for _ in PROMPTS]
            for session, prompt in zip(sessions, PROMPTS, strict=True):
                engine.prefill(session, prompt)
            steps = [[engine.decode(session).token for session in sessions] for _ in range(15)]
        assert [list(tokens) for tokens in zip(*steps, strict=True)] == alone

    @pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 39])
    def test_chunked_prefill_is_whole_prefill(self, engine: Engine, size: int) -> None:
        """It does not matter in how many calls the tokens come."""
        with Session() as session:
            for start in range(0, len(PROMPT), size):
                engine.prefill(session, PROMPT[start : start + size])
            assert decode(engine, session, 15) == answer(engine, PROMPT, 15)

    @pytest.mark.parametrize("common", [0, 1, 25, 39, 40, 45, 46])
    def test_prompt_is_a_fresh_session(self, engine: EngineWithSlots, common: int) -> None:
        """A history that is replaced, whatever it shares with the old one, answers as a new session."""
        with Session() as session:
            engine.prefill(session, PROMPT)
            old = PROMPT + decode(engine, session, 6)
            tokens = old[:common] + OTHER
            reused = engine.prompt(session, tokens)
            assert look(engine, session) == (tokens, len(tokens) - 1)
            assert decode(engine, session, 15) == answer(engine, tokens, 15)
        # The last token of the old history was pending, so it was not there to be reused.
        self.check_reused(reused, min(common, len(old) - 1))

    def test_prompt_that_is_the_whole_history(self, engine: EngineWithSlots) -> None:
        """Asked again for what it has, a session keeps the cache and still has something to decode."""
        with Session() as session:
            engine.prefill(session, PROMPT)
            first = decode(engine, session, 10)
            self.check_reused(engine.prompt(session, PROMPT), len(PROMPT) - 1)
            assert decode(engine, session, 10) == first

    def check_reused(self, reused: int, common: int) -> None:
        """Require that of the tokens in common as many were reused as the engine can."""
        assert reused == common

    @pytest.mark.parametrize("pending", [0, 1, 7])
    def test_rewind_is_a_fresh_session(self, engine: EngineWithSlots, pending: int) -> None:
        """After a rewind, tokens added are answered as in a session that never had the others."""
        with Session() as session:
            engine.prefill(session, PROMPT)
            decode(engine, session, 5)
            with engine.slots.borrow(session) as state:
                state.rewind(20, pending=pending)
            engine.prefill(session, OTHER)
            assert decode(engine, session, 15) == answer(engine, PROMPT[:20] + OTHER, 15)

    @pytest.mark.parametrize("length", [1, 20, len(PROMPT) - 1])
    def test_fully_covered(self, engine: EngineWithSlots, length: int) -> None:
        """With nothing pending, the last token is fed again: the answer is that of a fresh session."""
        with Session() as session:
            engine.prefill(session, PROMPT)
            with engine.slots.borrow(session) as state:
                covered = state.kv_length
                state.rewind(length, pending=0)
                if length == covered:  # Nothing had to be cut.
                    assert not state.pending
            assert decode(engine, session, 5) == answer(engine, PROMPT[:length], 5)

    @pytest.mark.parametrize("call", ["prefill", "prompt"])
    @pytest.mark.parametrize("token", [-1, VOCAB_SIZE, 2**31, 2**62])
    def test_bad_tokens_are_refused(
        self, engine: EngineWithSlots, capfd: pytest.CaptureFixture[str], call: str, token: int
    ) -> None:
        """A token that isn't in the vocabulary is refused, changes nothing, and is shown nowhere."""
        with Session() as session:
            engine.prefill(session, PROMPT)
            before = look(engine, session)
            with pytest.raises(ValueError, match=r"^token 1 .* vocabulary of 128$") as error:
                getattr(engine, call)(session, [3, token, 2])
            assert look(engine, session) == before
        if token != VOCAB_SIZE:
            assert str(token) not in str(error.value).removeprefix("token 1 ")
        assert capfd.readouterr().err == ""

    def test_empty_session_is_refused(self, engine: Engine) -> None:
        """There is nothing to decode from; and nothing is wrong with it, once it has tokens."""
        with Session() as session:
            with pytest.raises(ValueError, match="session is empty"):
                engine.decode(session)
            assert session.token_count == 0
            engine.prefill(session, PROMPT)
            assert decode(engine, session, 5) == answer(engine, PROMPT, 5)


class RefusingTokens:
    """Only ints of the vocabulary get as far as the history: a test, which is given an `engine`."""

    @pytest.mark.parametrize("tokens", [[1.0, 2.0], ["1"], [None], [[1, 2]], 3, [1, 2**70]])
    @pytest.mark.parametrize("call", ["prefill", "prompt"])
    def test_what_is_no_token_changes_nothing(
        self, engine: EngineWithSlots, call: str, tokens: object
    ) -> None:
        """What isn't an int of the vocabulary is refused, and changes nothing."""
        with Session() as session:
            engine.prefill(session, PROMPT)
            before = look(engine, session)
            with pytest.raises(
                (TypeError, ValueError), match=r"integer|iterable|vocabulary of 128"
            ):
                getattr(engine, call)(session, tokens)
            assert look(engine, session) == before
