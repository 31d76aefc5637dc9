"""What the tests of engines over the NumPy model have in common where they step many sessions at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import pytest
from tests.serving import PROMPTS, EngineWithSlots, answer

from inference_session import Session
from inference_session.engine import BatchEngine
from llama_model import Batch, Floats, Llama


class EngineWithBatches(BatchEngine, EngineWithSlots, Protocol):
    """An engine that steps many sessions at once."""


class Batching:
    """A batch changes nothing but the costs: tests, which are given an `engine`."""

    def test_batch_decode_is_single_decode(self, engine: EngineWithBatches) -> None:
        """A batch computes what each of its sessions would alone, whatever each must catch up with."""
        alone = [answer(engine, prompt, 20) for prompt in PROMPTS]
        sessions = [Session() for _ in PROMPTS]
        for session, prompt in zip(sessions, PROMPTS, strict=True):
            engine.prefill(session, prompt)
        steps: list[list[int]] = []
        for step in range(20):
            if step % 3 == 2:
                engine.slots.evict(sessions[step % len(sessions)])
            steps.append([result.token for result in engine.decode_batch(sessions)])
        self.check_memory(engine, sessions)
        for session in sessions:
            session.close()
        assert [list(tokens) for tokens in zip(*steps, strict=True)] == alone

    def check_memory(self, engine: EngineWithBatches, sessions: Sequence[Session]) -> None:
        """Require that the engine's memory is as it should be with these sessions."""

    def test_batch_decode_is_one_pass(
        self, engine: EngineWithBatches, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The weights, which are most of what a step costs, are read once for a whole batch."""
        sessions = [Session() for _ in PROMPTS]
        for session, prompt in zip(sessions, PROMPTS, strict=True):
            engine.prefill(session, prompt)
        passes: list[int] = []
        forward = Llama.forward

        def counted(model: Llama, batch: Batch) -> Floats:
            passes.append(len(batch))
            return forward(model, batch)

        monkeypatch.setattr(Llama, "forward", counted)
        engine.decode_batch(sessions)
        for session in sessions:
            session.close()
        assert passes == [len(PROMPTS)]
