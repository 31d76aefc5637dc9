"""Speculative decoding: the tokens are those of plain decoding, whatever is guessed and whatever fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_session import Session
from inference_session.exceptions import SessionBusyError, SessionClosedError
from llama_model import Batch, Floats, Llama, random_model
from numpy_llama import LlamaEngine, Sampler, greedy, sampling
from speculative import speculate


MODEL = random_model(1, context_length=100)
DRAFTS = {
    "itself": MODEL,
    "fewer layers": replace(MODEL, layers=MODEL.layers[:2]),
    "another": random_model(2, context_length=60),
}
PROMPT = [17, 4, 99, 23, 5, 81, 64, 2]


def decode(count: int, sample: Sampler = greedy, prompt: Sequence[int] = PROMPT) -> list[int]:
    """Return what plain decoding adds."""
    engine = LlamaEngine(MODEL)
    with Session() as session:
        engine.prefill(session, prompt)
        return [engine.decode(session, sample=sample).token for _ in range(count)]


@dataclass(frozen=True, kw_only=True)
class CountingLlama(Llama):
    """Counts its passes, and can fail in one."""

    passes: list[int] = field(default_factory=list[int])
    fails_at: list[int] = field(default_factory=list[int])

    def hidden_states(self, batch: Batch) -> Floats:
        """Do the work, which counts for nothing if the pass fails."""
        hidden = super().hidden_states(batch)
        self.passes.append(sum(len(tokens) for _, tokens in batch))
        if len(self.passes) in self.fails_at:
            raise MemoryError
        return hidden


def counting(model: Llama) -> CountingLlama:
    """Return a model that counts."""
    return CountingLlama(**{part.name: getattr(model, part.name) for part in fields(model)})


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("sample", [greedy, sampling(seed=5)], ids=["greedy", "seeded"])
@given(guesses=st.integers(0, 6), prompt=st.lists(st.integers(0, 127), min_size=1, max_size=20))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_same_as_decoding(draft: str, sample: Sampler, guesses: int, prompt: list[int]) -> None:
    """No guess, right or wrong, shows in the tokens; both sessions have what they should."""
    engine, guesser = LlamaEngine(MODEL), LlamaEngine(DRAFTS[draft])
    with Session() as session, Session() as draft_session:
        engine.prefill(session, prompt)
        tokens: list[int] = []
        while len(tokens) < 30:
            new = speculate(engine, session, guesser, draft_session, guesses=guesses, sample=sample)
            assert 1 <= len(new) <= guesses + 1
            tokens += new
        with engine.slots.borrow(session) as state:
            assert state.token_history == prompt + tokens
            assert state.pending == tokens[-1:]
    assert tokens == decode(len(tokens), sample, prompt)
    assert engine.memory.used == guesser.memory.used == 0


def test_right_guesses_save_passes() -> None:
    """With a draft that is always right, a pass of the large model gives as many tokens as it can."""
    model = counting(MODEL)
    engine, draft = LlamaEngine(model), LlamaEngine(MODEL)
    with Session() as session, Session() as draft_session:
        engine.prefill(session, PROMPT)
        model.passes.clear()
        tokens = [
            token for _ in range(6) for token in speculate(engine, session, draft, draft_session)
        ]
    assert tokens == decode(30)
    assert model.passes == [5] * 6


@pytest.mark.parametrize("lose", ["target", "draft"])
def test_recomputes_what_was_evicted(lose: str) -> None:
    """Either KV cache may be evicted between steps."""
    engine, draft = LlamaEngine(MODEL), LlamaEngine(DRAFTS["fewer layers"])
    with Session() as session, Session() as draft_session:
        engine.prefill(session, PROMPT)
        tokens: list[int] = []
        while len(tokens) < 20:
            tokens += speculate(engine, session, draft, draft_session)
            if lose == "target":
                engine.slots.evict(session)
            else:
                draft.slots.evict(draft_session)
    assert tokens == decode(len(tokens))


@pytest.mark.parametrize("length", [1, 5, 7])
def test_fully_covered(length: int) -> None:
    """Sessions of which nothing is pending feed their last token again."""
    engine, draft = LlamaEngine(MODEL), LlamaEngine(DRAFTS["fewer layers"])
    with Session() as session, Session() as draft_session:
        for owner, covered in ((engine, session), (draft, draft_session)):
            owner.prefill(covered, PROMPT)
            with owner.slots.borrow(covered) as state:
                state.rewind(length, pending=0)
                assert not state.pending
        tokens: list[int] = []
        while len(tokens) < 20:
            tokens += speculate(engine, session, draft, draft_session)
    assert tokens == decode(len(tokens), prompt=PROMPT[:length])


def test_long_history_is_fed_in_chunks() -> None:
    """Once its KV cache was evicted, a history is fed by as many tokens at once as the engine takes."""
    model = counting(MODEL)
    engine, draft = LlamaEngine(model, chunk=3), LlamaEngine(MODEL)
    with Session() as session, Session() as draft_session:
        engine.prefill(session, PROMPT)
        engine.slots.evict(session)
        model.passes.clear()
        assert speculate(engine, session, draft, draft_session) == decode(5)
    assert model.passes == [3, 3, 1, 5]


@pytest.mark.parametrize("failing", range(1, 12))
@pytest.mark.parametrize("where", ["target", "draft"])
def test_failed_step_leaves_no_trace(where: str, failing: int) -> None:
    """Whichever pass fails, guesses are not in the history, and the next step is right."""
    large, small = counting(MODEL), counting(DRAFTS["fewer layers"])
    engine, draft = LlamaEngine(large), LlamaEngine(small)
    with Session() as session, Session() as draft_session:
        engine.prefill(session, PROMPT)
        large.passes.clear()
        (large if where == "target" else small).fails_at.append(failing)
        tokens: list[int] = []
        failed = 0
        while len(tokens) < 40:
            try:
                tokens += speculate(engine, session, draft, draft_session)
            except MemoryError:
                failed += 1
                with engine.slots.borrow(session) as state:
                    assert state.token_history == PROMPT + tokens
                    assert state.pending == state.token_history[-1:]
    assert failed == 1
    assert tokens == decode(len(tokens))


def test_end_of_the_context() -> None:
    """Guesses never go beyond the context; a draft with a shorter one stops guessing."""
    for model in DRAFTS.values():
        engine, draft = LlamaEngine(MODEL), LlamaEngine(model)
        with Session() as session, Session() as draft_session:
            engine.prefill(session, PROMPT)
            tokens: list[int] = []
            while len(tokens) < 92:
                tokens += speculate(engine, session, draft, draft_session)
            assert tokens == decode(92)
            with pytest.raises(ValueError, match="no room"):
                speculate(engine, session, draft, draft_session)
            assert session.token_count == 100


def test_refused() -> None:
    """An empty, a busy or a closed session is refused, the draft's, too, and nothing changes."""
    engine, draft = LlamaEngine(MODEL), LlamaEngine(MODEL)
    with Session() as session, Session() as draft_session:
        with pytest.raises(ValueError, match="nothing to decode from"):
            speculate(engine, session, draft, draft_session)
        engine.prefill(session, PROMPT)

        def step() -> list[int]:
            return speculate(engine, session, draft, draft_session)

        refusals: list[tuple[LlamaEngine, Session]] = [(engine, session), (draft, draft_session)]
        for owner, busy in refusals:
            with owner.slots.borrow(busy):
                _refused(step, SessionBusyError)
        assert step() == decode(5)
        draft_session.close()
        _refused(step, SessionClosedError)
        assert session.token_count == len(PROMPT) + 5


def _refused(step: Callable[[], object], error: type[Exception]) -> None:
    with pytest.raises(error):
        step()
