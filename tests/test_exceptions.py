"""Errors: one root, the session's id, and nothing lost on the way to another process."""

import copy
import inspect
import pickle
import re
from collections.abc import Callable
from uuid import UUID, uuid4

import cloudpickle  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]
import pytest

from inference_session import exceptions
from inference_session.engine import TORN
from inference_session.exceptions import (
    BorrowExpiredError,
    RegistryFullError,
    SessionBusyError,
    SessionClosedError,
    SessionError,
    SessionExistsError,
    SessionFileError,
    SessionForkedError,
    SessionNotFoundError,
    SessionOwnerError,
    StateMismatchError,
)


SOME_ID = UUID("12345678-1234-5678-1234-567812345678")
OF_A_SESSION = [
    BorrowExpiredError,
    SessionBusyError,
    SessionClosedError,
    SessionExistsError,
    SessionForkedError,
    SessionNotFoundError,
    SessionOwnerError,
]
ERRORS_OF_A_SESSION: list[SessionError] = [
    *(error(SOME_ID) for error in OF_A_SESSION),
    StateMismatchError(SOME_ID, 5, 3, "advance"),
]
ERRORS = [
    *ERRORS_OF_A_SESSION,
    RegistryFullError(7),
    SessionFileError("a.session", "its head or its tokens are damaged"),
]
CLASSES = [getattr(exceptions, name) for name in exceptions.__all__]

each_error = pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
each_of_a_session = pytest.mark.parametrize(
    "error", ERRORS_OF_A_SESSION, ids=lambda error: type(error).__name__
)
each_class = pytest.mark.parametrize("error_class", CLASSES, ids=lambda it: it.__name__)


def test_every_error_is_tested() -> None:
    """An error that is added is tested here, too."""
    assert {type(error) for error in ERRORS} == set(CLASSES) - {SessionError}


@each_class
def test_root(error_class: type[Exception]) -> None:
    """`except SessionError` catches all, and no foreign error: `ValueError` means a wrong argument or a wrong file."""
    assert issubclass(error_class, SessionError)
    assert SessionError.__bases__ == (Exception,)
    assert issubclass(error_class, ValueError) == (error_class is SessionFileError)
    assert not issubclass(error_class, TypeError | RuntimeError)


@each_class
def test_docstring(error_class: type[Exception]) -> None:
    """Each says in one sentence when one gets it, and then when not."""
    doc = inspect.getdoc(error_class)
    assert doc is not None
    assert doc.splitlines()[0].endswith((".", ":")) or ". " in doc
    assert "do *not* get it" in " ".join(doc.split())
    assert error_class.__doc__ != Exception.__doc__


@each_error
def test_message(error: SessionError) -> None:
    """The message reads as a sentence that ends in what to do or what is known."""
    text = str(error)
    assert text[0].islower()
    assert not text.endswith(".")
    assert "\n" not in text


@each_of_a_session
def test_session_id(error: SessionError) -> None:
    """A server knows by an attribute which session it was, and a reader by the message."""
    assert str(SOME_ID) in str(error)
    assert getattr(error, "session_id") == SOME_ID  # noqa: B009 the root hasn't got it


def test_mismatch() -> None:
    """The error tells how far the cache is from what it should cover."""
    error = StateMismatchError(SOME_ID, expected=5, actual=3)
    assert (error.expected, error.actual) == (5, 3)
    assert "should cover 5 tokens" in str(error)
    assert "its length is 3" in str(error)


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("create", "should cover 0 tokens, .* create must return a KV cache that covers no"),
        ("advance", "should cover 0 tokens, .* how many pending tokens the model was fed"),
        ("commit", "should cover 0 tokens, .* call advance after each time"),
        ("truncate", "should cover at most 0 tokens, .* at most the first n tokens"),
        ("share", "should cover at most 0 tokens, .* at most the first n tokens"),
    ],
)
def test_mismatch_says_where(where: str, says: str) -> None:
    """The error tells which call saw it, and what that one expects of an engine."""
    error = StateMismatchError(SOME_ID, 0, 3, where)
    assert error.where == where
    assert re.search(f"^{where}: .*{says}", str(error))


@pytest.mark.parametrize("where", ["", "advance", "truncate"])
def test_torn(where: str) -> None:
    """Layers that disagree are called so, by no number."""
    error = StateMismatchError(SOME_ID, 5, TORN, where)
    assert error.actual == TORN
    assert "its length is TORN, as its layers disagree" in str(error)
    assert str(TORN) not in str(error)


def test_not_found() -> None:
    """Who treats the registry as a mapping catches a `KeyError`, but gets a message that isn't quoted as a key is."""
    error = SessionNotFoundError(SOME_ID)
    assert isinstance(error, KeyError)
    assert str(error).startswith("there is no open session 1234")


def test_file() -> None:
    """A server learns which file it was."""
    error = SessionFileError("a.session", "its head or its tokens are damaged")
    assert isinstance(error, ValueError)
    assert (error.path, error.problem) == ("a.session", "its head or its tokens are damaged")
    assert str(error).startswith("no session can be restored from 'a.session': its head")


def test_full() -> None:
    """A server learns how many sessions there may be."""
    error = RegistryFullError(7)
    assert error.max_sessions == 7
    assert "max_sessions=7" in str(error)


PICKLERS: list[Callable[[SessionError], SessionError]] = [
    *(
        lambda error, protocol=protocol: pickle.loads(pickle.dumps(error, protocol))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    ),
    lambda error: pickle.loads(cloudpickle.dumps(error)),  # pyright: ignore[reportUnknownMemberType]
    copy.copy,
    copy.deepcopy,
]


@each_error
@pytest.mark.parametrize(
    "there_and_back",
    PICKLERS,
    ids=[
        *(f"pickle{n}" for n in range(pickle.HIGHEST_PROTOCOL + 1)),
        "cloudpickle",
        "copy",
        "deepcopy",
    ],
)
def test_pickling(
    error: SessionError, there_and_back: Callable[[SessionError], SessionError]
) -> None:
    """A worker process reports the same error, with all it has to tell."""
    noted = copy.copy(error)
    noted.add_note("a note")
    for before in (error, noted):
        after = there_and_back(before)
        assert type(after) is type(before)
        assert str(after) == str(before)
        assert repr(after) == repr(before)
        assert vars(after) == vars(before)
        assert after.args == before.args


@each_error
def test_repr(error: SessionError) -> None:
    """A log of the error's `repr` is as good as its message."""
    assert type(error).__name__ in repr(error)
    for value in vars(error).values():
        assert str(value) in repr(error)


@pytest.mark.parametrize("error_class", OF_A_SESSION, ids=lambda it: it.__name__)
def test_arguments(error_class: Callable[..., SessionError]) -> None:
    """A test of an engine or a server makes them with an id, by position or by name."""
    some_id = uuid4()
    assert str(error_class(session_id=some_id)) == str(error_class(some_id))
    with pytest.raises(TypeError):
        error_class()
