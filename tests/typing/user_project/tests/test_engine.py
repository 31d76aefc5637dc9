"""The engine keeps what it promises, and so does the server."""

from collections.abc import Callable
from uuid import uuid4

import pytest

from inference_session import Session
from inference_session.engine import Engine
from inference_session.exceptions import SessionBusyError, SessionNotFoundError
from inference_session.testing import check_engine, parametrize_with_checks
from toy_engine import VOCABULARY, Server, ToyEngine


@parametrize_with_checks(ToyEngine, vocab_size=VOCABULARY)
def test_engine(check: Callable[[], None]) -> None:
    """It passes every check of the conformance kit."""
    check()


def test_replay_alone() -> None:
    """One check can be run alone, and an engine be typed as such."""
    engine: Engine = ToyEngine()
    assert engine.prefill(Session(), [1, 2]).tokens_processed == 2
    check_engine(ToyEngine, vocab_size=VOCABULARY, max_examples=1)


def test_server() -> None:
    """A chat is begun, streamed and ended, and an id that's unknown is said to be."""
    server = Server(ToyEngine())
    chat = server.start([3, 1, 4])
    assert len(list(server.stream(chat, 5))) == 5
    with pytest.raises(SessionNotFoundError) as caught:
        list(server.stream(uuid4(), 1))
    assert server.status(caught.value) == 404
    assert server.status(SessionBusyError(chat)) == 409
    server.close()
