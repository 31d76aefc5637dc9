"""`os.fork` copies sessions, and the copies must not act: refused in the child, undisturbed in the parent."""

import gc
import multiprocessing
import os
import sys
import sysconfig
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.members import MEMBERS
from tests.processes import run_python, run_script

from inference_session import Session, SessionRegistry, _fork
from inference_session.engine import StateSlots
from inference_session.exceptions import SessionBusyError, SessionForkedError


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

released: list[int] = []
"""The processes in which a KV cache was released."""


def release(cache: list[int]) -> None:
    """Note in which process it is."""
    released.append(os.getpid())


def truncate(cache: list[int], length: int) -> list[int]:
    """Do it in place."""
    del cache[length:]
    return cache


SLOTS = StateSlots(create=list[int], length=len, truncate=truncate, release=release)
NO_TRUNCATE = StateSlots(create=list[int], length=len, release=release)


def step(session: Session, slots: StateSlots[list[int]] = SLOTS) -> None:
    """Add two tokens."""
    with slots.borrow(session) as state:
        state.append([1, 2])
        state.kv_cache.extend(state.pending)
        state.advance(2)


@pytest.fixture
def session() -> Iterator[Session]:
    """Return a session with two tokens, and require it to be released here, once."""
    released.clear()
    session = Session()
    step(session)
    yield session
    session.close()
    assert released == [os.getpid()]


def in_child(do: Callable[[], object]) -> None:
    """Do something in a forked child that then ends at once, and require that it succeeds."""
    with warnings.catch_warnings():
        # From 3.12 on, where other threads run: the very case to be tested.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            released.clear()
            do()
            gc.collect()
            assert released == [], "released in the child"
            status = 0
        except BaseException:  # noqa: BLE001 pytest must not go on in the child
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    wait(child)


def wait(child: int) -> None:
    """Require that a child ends well, and soon."""
    deadline = time.monotonic() + 60
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.001)


def check_refused(session: Session) -> None:
    """Require that a session can't be used in any way."""
    with pytest.raises(SessionForkedError) as caught, SLOTS.borrow(session):
        pass
    assert caught.value.session_id == session.id
    with pytest.raises(SessionForkedError), SLOTS.borrow_all([Session(), session]):
        pass
    with pytest.raises(SessionForkedError):
        SLOTS.evict(session)
    with pytest.raises(SessionForkedError), SessionRegistry() as registry:
        registry.add(session)


def check_new_sessions() -> None:
    """Require that sessions made here work."""
    mine = [Session() for _ in range(3)]
    for session in mine:
        step(session)
    with SLOTS.borrow_all(mine) as states:
        assert all(state.token_history == [1, 2] for state in states)
    before = len(released)
    for session in mine:
        session.close()
    assert released[before:] == [os.getpid()] * 3
    del released[before:]


@needs_fork
def test_an_idle_session(session: Session) -> None:
    """An inherited session is refused in the child; its id and token count can still be read, and it can be closed."""

    def child() -> None:
        check_refused(session)
        assert session.token_count == 2
        assert str(session.id) in repr(session)
        session.close()
        check_refused(session)
        check_new_sessions()

    in_child(child)
    assert not session.closed
    step(session)
    assert session.token_count == 4


@needs_fork
def test_a_new_session() -> None:
    """A session that holds nothing yet is refused, too: it's the parent's."""
    session = Session()
    in_child(lambda: check_refused(session))
    step(session)
    session.close()


@needs_fork
def test_a_closed_session() -> None:
    """A session closed before the fork is refused with the reason that comes first: it's the parent's."""
    session = Session()
    session.close()
    in_child(lambda: check_refused(session))


@needs_fork
def test_a_session_borrowed_in_mid_fork(session: Session) -> None:
    """A session borrowed by the parent is not busy but forked in the child."""

    def child() -> None:
        check_refused(session)
        check_new_sessions()

    with SLOTS.borrow(session) as state:
        state.append([3])
        in_child(child)
        with pytest.raises(SessionBusyError), SLOTS.borrow(session):
            pass
        state.kv_cache.append(3)
        state.advance(1)
    assert session.token_count == 3


@needs_fork
def test_whether_it_is_borrowed(session: Session) -> None:
    """No step is under way in a child, whatever it was forked in the midst of."""
    in_child(lambda: check_not_borrowed(session))
    with SLOTS.borrow(session):
        in_child(lambda: check_not_borrowed(session))
        assert session.borrowed


def check_not_borrowed(session: Session) -> None:
    """Require that a session isn't borrowed, nor said to be."""
    assert not session.borrowed
    assert "borrowed" not in repr(session)


@needs_fork
@pytest.mark.parametrize("batch", [False, True], ids=["borrow", "borrow_all"])
def test_the_members_of_an_inherited_state(session: Session, *, batch: bool) -> None:
    """Whatever is asked of a state that a child inherited is refused, with the reason."""
    borrow = SLOTS.borrow_all([session]) if batch else SLOTS.borrow(session)
    with borrow as entered:
        state = entered[0] if isinstance(entered, list) else entered
        history = state.token_history

        def child() -> None:
            for use in MEMBERS.values():
                with pytest.raises(SessionForkedError):
                    use(state)
            with pytest.raises(SessionForkedError):
                len(history)

        in_child(child)
        assert (state.token_history, state.kv_cache, state.pending) == ([1, 2], [1, 2], [])


@needs_fork
@pytest.mark.parametrize("batch", [False, True], ids=["borrow", "borrow_all"])
@pytest.mark.parametrize("failure", [None, MemoryError()], ids=["clean", "exception"])
def test_the_end_of_an_inherited_borrow(
    session: Session, *, batch: bool, failure: MemoryError | None
) -> None:
    """Where a child leaves a block that it inherited, nothing is committed; an exception goes on unchanged."""
    borrow = SLOTS.borrow_all([session]) if batch else SLOTS.borrow(session)

    def child() -> None:
        if failure is None:
            with pytest.raises(SessionForkedError):
                borrow.__exit__(None, None, None)
        else:
            borrow.__exit__(MemoryError, failure, None)
        assert session.token_count == 2
        check_refused(session)
        check_new_sessions()

    entered = borrow.__enter__()
    state = entered[0] if isinstance(entered, list) else entered
    state.append([3])
    state.kv_cache.append(3)
    state.advance(1)
    in_child(child)
    borrow.__exit__(None, None, None)
    assert session.token_count == 3


@needs_fork
@pytest.mark.parametrize("slots", [SLOTS, NO_TRUNCATE], ids=["truncates", "no truncate"])
def test_an_inherited_borrow_still_open(slots: StateSlots[list[int]]) -> None:
    """Whatever a child tries with a borrow that it inherited, the parent's KV cache isn't released there."""
    released.clear()
    session = Session()
    step(session, slots)
    with slots.borrow(session) as state:
        state.append([3])
        state.kv_cache.append(3)
        state.advance(1)

        def attempt(do: Callable[[], object]) -> None:
            with suppress(SessionForkedError):
                do()

        def replace() -> None:
            state.kv_cache = [*state.kv_cache]
            state.commit()
            state.kv_cache = [*state.kv_cache]
            state.commit()

        in_child(lambda: attempt(lambda: state.rewind(1)))
        in_child(lambda: attempt(lambda: state.reuse_prefix([7, 8])))
        in_child(lambda: attempt(lambda: state.chunks(1, keep=2)))
        in_child(lambda: attempt(replace))
    assert session.token_count == 3
    session.close()
    assert released == [os.getpid()]


@needs_fork
def test_an_abandoned_borrow() -> None:
    """A session left with work to undo is refused in the child, and undone in the parent."""
    released.clear()
    session = Session()
    step(session)
    state = SLOTS.borrow(session).__enter__()
    state.append([9])
    del state
    in_child(lambda: check_refused(session))
    with SLOTS.borrow(session) as state:
        assert state.token_history == [1, 2]
    session.close()
    assert released == [os.getpid()]


@needs_fork
def test_a_session_that_dies_in_the_child() -> None:
    """A child may drop an inherited session: no warning, and nothing is released."""
    released.clear()
    sessions = [Session()]
    step(sessions[0])
    in_child(sessions.clear)
    assert released == []
    sessions[0].close()
    assert released == [os.getpid()]


@needs_fork
def test_a_grandchild(session: Session) -> None:
    """A child's sessions are refused in its own children."""

    def child() -> None:
        mine = Session()
        step(mine)

        def grandchild() -> None:
            check_refused(session)
            check_refused(mine)
            check_new_sessions()

        in_child(grandchild)
        step(mine)
        assert mine.token_count == 4
        mine.close()
        assert released == [os.getpid()]
        released.clear()

    in_child(child)


@needs_fork
@pytest.mark.skipif(
    sys.version_info < (3, 14) and bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    reason="a fork without a GIL can inherit locks of the interpreter's own, up to 3.13",
)
def test_forks_while_other_threads_work() -> None:
    """Wherever other threads are at the moment of the fork, new sessions in the child work, and nothing hangs.

    The same holds for a registry: the child may use its copy at once.
    """
    done = run_script("busy_forks", measured=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "40\n", "")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(method: str) -> None:
    """Workers have sessions of their own, however they are started; none can be sent to them."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    done = run_script("workers", method)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "4", "6", "TypeError"]


@needs_fork
def test_a_child_that_exits_as_usual(tmp_path: Path) -> None:
    """The exit of a child's interpreter releases nothing that it inherited, and says nothing."""
    done = run_script("forks", tmp_path / "released", options=("-X", "dev"))
    assert (done.returncode, done.stderr) == (0, "")
    parent = done.stdout.strip()
    assert (tmp_path / "released").read_text().split() == [parent] * 3


@needs_fork
@pytest.mark.parametrize(
    "case",
    [
        "closed",
        "closed_by_the_registry",
        "dropped",
        "borrowed",
        "in_mid_borrow",
        "ended",
        "while_locked",
        "while_others_fork",
    ],
)
def test_hooks_that_are_older_than_the_library(case: str) -> None:
    """A framework whose own fork hook runs first in the child releases nothing there, and is refused as anyone."""
    done = run_script("earlier_hook", case, measured=False)
    assert (done.returncode, done.stderr) == (0, "")
    kept = 3 if case == "in_mid_borrow" else 2
    assert done.stdout.splitlines() == ["in the parent"] * kept


def test_a_platform_without_fork() -> None:
    """Where there is no fork, the library imports and works all the same."""
    program = """
import os
for name in ("fork", "register_at_fork"):
    if hasattr(os, name):
        delattr(os, name)
from inference_session import Session
from inference_session.engine import StateSlots
slots = StateSlots(create=list, length=len)
with Session() as session:
    with slots.borrow(session) as state:
        state.append([1])
    slots.evict(session)
    print(session.token_count)
"""
    done = run_python("-X", "dev", "-c", program)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["1"], "")


def test_several_forks_at_once() -> None:
    """As long as any thread forks, nobody is trusted but the operating system; a hook that was struck does no harm."""
    _fork._before()
    _fork._before()
    assert _fork.pid == 0
    _fork._after_in_parent()
    assert _fork.pid == 0
    assert _fork.is_here(os.getpid())
    assert not _fork.is_here(os.getppid())
    for _ in range(2):
        _fork._after_in_parent()
        assert _fork.pid == os.getpid()
