"""What the tests of engines with `share`, `dump` and `load` have in common: files and branches go on the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.serving import OTHER, PROMPT, EngineWithSlots, answer, decode, look

from inference_session import Session


def saved(engine: EngineWithSlots, path: Path) -> tuple[list[int], list[int]]:
    """Move a session to a file; return its tokens, and the ten that an undisturbed one decodes next."""
    with Session() as session:
        engine.prefill(session, PROMPT)
        tokens = PROMPT + decode(engine, session, 6)
        engine.slots.save(session, path, move=True)
        assert session.closed
    return tokens, answer(engine, PROMPT, 16)[6:]


def check_computed_anew(
    engine: EngineWithSlots, path: Path, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    """Require that an engine takes the tokens of a file, but not its KV cache, says why, and answers right."""
    caplog.clear()
    with engine.slots.restore(path) as session:
        (record,) = caplog.records
        assert record.getMessage() == (
            f"restored session {session.id} without its KV cache: {reason}"
        )
        tokens, covered = look(engine, session)
        assert covered == 0
        assert decode(engine, session, 10) == answer(engine, tokens, 10)


def go_on(engine: EngineWithSlots, path: str) -> None:
    """Restore a session; write to the output how much its KV cache covers, and the next tokens."""
    with engine.slots.restore(path) as session:
        covered = look(engine, session)[1]
        json.dump([covered, *decode(engine, session, 10)], sys.stdout)


def go_on_elsewhere(make_engine: str, path: Path) -> list[int]:
    """Run `go_on` in a process of its own, with the engine that is made by a piece of Python."""
    code = f"{make_engine}\nimport sys\nfrom tests.saving import go_on\ngo_on(engine, sys.argv[1])"
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=100,
        check=True,
    )
    found: list[int] = json.loads(run.stdout)
    return found


class Saving:
    """A session goes on the same in a file and in a branch: tests, which are given an `engine`."""

    def test_restored_session_goes_on(self, engine: EngineWithSlots, tmp_path: Path) -> None:
        """What comes out of a file has all its KV cache, and says what it would have said."""
        tokens, expected = saved(engine, tmp_path / "session")
        with engine.slots.restore(tmp_path / "session", take=True) as session:
            assert look(engine, session) == (tokens, len(tokens) - 1)
            assert decode(engine, session, 10) == expected

    def test_restored_session_goes_back(self, engine: EngineWithSlots, tmp_path: Path) -> None:
        """Also with another end, what comes out of a file answers as a new session."""
        tokens, _ = saved(engine, tmp_path / "session")
        with engine.slots.restore(tmp_path / "session") as session:
            history = tokens[:42] + OTHER
            engine.prompt(session, history)
            assert decode(engine, session, 10) == answer(engine, history, 10)

    @pytest.mark.parametrize("length", [0, 1, 20, 45, 46])
    def test_branch_goes_its_own_way(self, engine: EngineWithSlots, length: int) -> None:
        """Neither a session nor its branch sees the steps of the other."""
        expected = answer(engine, PROMPT, 16)
        with Session() as parent:
            engine.prefill(parent, PROMPT)
            tokens = PROMPT + decode(engine, parent, 6)
            with engine.slots.borrow(parent) as state:
                child = state.branch(length)
            with child:
                history, covered = look(engine, child)
                assert history == tokens[:length]
                self.check_shared(covered, max(length - 1, 0))
                engine.prefill(child, OTHER)
                pairs = [(decode(engine, parent, 1), decode(engine, child, 1)) for _ in range(10)]
            assert [token for (token,), _ in pairs] == expected[6:]
            assert [token for _, (token,) in pairs] == answer(engine, tokens[:length] + OTHER, 10)

    def check_shared(self, covered: int, most: int) -> None:
        """Require that a branch's KV cache covers as many of the tokens as the engine can share."""
        assert covered == most

    def test_branches_outlive_their_parent(self, engine: EngineWithSlots, tmp_path: Path) -> None:
        """Branches, and one of them from a file, need nothing of the session they are from."""
        with ExitStack() as closing:
            with Session() as parent:
                engine.prefill(parent, PROMPT)
                with engine.slots.borrow(parent) as state:
                    children = [closing.enter_context(state.branch()) for _ in range(2)]
                engine.slots.save(children[1], tmp_path / "session", move=True)
            children[1] = closing.enter_context(engine.slots.restore(tmp_path / "session"))
            for number, child in enumerate(children):
                engine.prefill(child, [number])
            found = [decode(engine, child, 10) for child in children]
        assert found == [answer(engine, [*PROMPT, number], 10) for number in range(2)]
