"""Files: a session is saved and restored with its id, its tokens, its key and its KV cache."""

# ruff: noqa: PT012 what's tested is how a block fails

import gc
import logging
import os
import socket
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast
from uuid import UUID

import pytest
from tests.caches import ERRORS, Cache, Fault, Lie, Memory, look, prepare
from tests.test_fork import in_child, needs_fork
from tests.threads import in_thread, race

from inference_session import Session, SessionRegistry, _file
from inference_session.engine import Slot, StateSlots
from inference_session.exceptions import (
    SessionBusyError,
    SessionClosedError,
    SessionError,
    SessionFileError,
    SessionForkedError,
    SessionOwnerError,
    StateMismatchError,
)


on_posix = pytest.mark.skipif(os.name == "nt", reason="files are other things on Windows")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give the path of a file in a folder of its own, in which nothing else may be left."""
    return tmp_path / "conversation"


@pytest.fixture
def saved(path: Path, session: Session, slots: StateSlots[Cache], memory: Memory) -> Path:
    """Give the file of a session with three tokens, two of them in its KV cache."""
    prepare(slots, memory, session, 1, 2)
    with slots.borrow(session) as state:
        state.append([3])
    slots.save(session, path)
    return path


def files(path: Path) -> list[str]:
    """Return what is in the folder of a file."""
    return sorted(entry.name for entry in path.parent.iterdir())


# What comes back


def test_round_trip(saved: Path, session: Session, slots: StateSlots[Cache]) -> None:
    """A restored session has the same id and tokens, and a KV cache of its own; the saved one is as it was."""
    with slots.restore(saved) as restored:
        assert restored.id == session.id
        assert restored.token_count == 3
        with slots.borrow(restored) as state, slots.borrow(session) as original:
            assert list(state.token_history) == list(original.token_history) == [1, 2, 3]
            assert state.kv_length == original.kv_length == 2
            assert state.kv_cache.tokens == [1, 2]
            assert state.kv_cache is not original.kv_cache
    assert files(saved) == ["conversation"]


def test_goes_on(saved: Path, slots: StateSlots[Cache], memory: Memory) -> None:
    """A restored session goes on as any other: it is stepped, rolled back, and saved again."""
    with slots.restore(saved) as restored:
        with pytest.raises(KeyError), slots.borrow(restored) as state:
            memory.step(state, 9)
            raise KeyError
        assert look(slots, restored) == ([1, 2, 3], 2)
        prepare(slots, memory, restored, 4)
        slots.save(restored, saved)
    with slots.restore(saved) as again:
        assert look(slots, again) == ([1, 2, 3, 4], 4)


@pytest.mark.parametrize("begun", [False, True])
def test_empty(path: Path, slots: StateSlots[Cache], *, begun: bool) -> None:
    """A session without tokens is saved, too, even if it was never borrowed; any engine may begin it then."""
    with Session() as session:
        if begun:
            with slots.borrow(session):
                pass
        slots.save(session, path)
        assert path.stat().st_size == 68
        with slots.restore(path) as restored:
            assert (restored.id, restored.token_count) == (session.id, 0)
            with StateSlots[list[int]](create=list, length=len).borrow(restored) as state:
                state.append([7])


def test_without_a_cache(path: Path, session: Session, slots: StateSlots[Cache]) -> None:
    """Tokens without a KV cache are pending again, and `load` isn't asked."""
    with slots.borrow(session) as state:
        state.append([1, 2])
    slots.save(session, path)
    with slots.restore(path) as restored:
        assert look(slots, restored) == ([1, 2], 0)


def test_an_empty_cache_is_not_saved(path: Path, session: Session, memory: Memory) -> None:
    """A KV cache that covers nothing is worth nothing: the next step makes one."""
    slots = memory.slots()
    with slots.borrow(session) as state:
        state.append([1])
        assert state.kv_cache.length == 0
    slots.save(session, path)
    with slots.restore(path) as restored:
        assert look(slots, restored) == ([1], 0)
    session.close()
    assert len(memory.caches) == 1


def test_without_dump_and_load(
    saved: Path, session: Session, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    """Without `dump` the tokens are saved; without `load` they are restored, and the KV cache is passed over."""
    session.close()
    memory.saves = False
    slots = memory.slots()
    with slots.restore(saved) as restored:
        assert look(slots, restored) == ([1, 2, 3], 0)
        assert caplog.messages == [
            f"restored session {session.id} without its KV cache: there is no load"
        ]
        prepare(slots, memory, restored, 4)
        slots.save(restored, saved)
    caplog.clear()
    with memory.slots().restore(saved) as restored:
        assert restored.token_count == 4
    assert not caplog.messages


def test_only_what_is_committed(path: Path, session: Session, slots: StateSlots[Cache]) -> None:
    """The file of a session whose last step failed or never ended has the tokens of the last commit."""
    with slots.borrow(session) as state:
        state.append([1])
    with pytest.raises(KeyError), slots.borrow(session) as state:
        state.append([2])
        raise KeyError
    block = slots.borrow(session)
    with pytest.raises(RuntimeError, match="dropped"):
        drop(block)
    slots.save(session, path)
    with slots.restore(path) as restored:
        assert look(slots, restored) == ([1], 0)


def drop(block: Any) -> None:
    """Append a token in a block that never ends, as when an interrupt comes just before."""
    state = block.__enter__()
    state.append([3])
    block._hold = None
    raise RuntimeError("dropped")


@pytest.mark.parametrize("key", ["", "adapter@7", "ключ 🗝", "\ud800 \udfff", "k" * 100_000])
def test_key(path: Path, session: Session, memory: Memory, key: str) -> None:
    """The KV cache is used by borrows with the key that it was computed under, whatever that is, and by no other."""
    slots = memory.slots()
    with slots.borrow(session, key=key) as state:
        memory.step(state, 1, 2)
    slots.save(session, path)
    with slots.restore(path) as same, slots.restore(path) as other:
        with slots.borrow(same, key=key) as state:
            assert state.kv_length == 2
        with slots.borrow(other, key=f"not {key}") as state:
            assert (state.kv_length, state.pending) == (0, [1, 2])
    session.close()


@pytest.mark.parametrize("id", [UUID(int=0), UUID(int=2**128 - 1)], ids=str)
def test_id(path: Path, slots: StateSlots[Cache], id: UUID) -> None:  # noqa: A002
    """Any id comes back."""
    with Session.with_id(id) as session:
        slots.save(session, path)
    assert slots.restore(path).id == id


def test_all_tokens(path: Path, session: Session, slots: StateSlots[Cache]) -> None:
    """The smallest and the largest token come back, and many."""
    tokens = [0, 2**31 - 1, *range(100_000)]
    with slots.borrow(session) as state:
        state.append(tokens)
    slots.save(session, path)
    assert look(slots, slots.restore(path)) == (tokens, 0)


def test_big_endian(
    path: Path, session: Session, slots: StateSlots[Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are swapped on the way out and on the way in where the machine's byte order isn't that of files."""
    with slots.borrow(session) as state:
        state.append([1, 2**30 + 7])
    other = "little" if sys.byteorder == "big" else "big"
    monkeypatch.setattr(_file, "byteorder", other)
    slots.save(session, path)
    assert struct.unpack_from(f"{'<' if other == 'little' else '>'}2i", path.read_bytes(), 68) == (
        1,
        2**30 + 7,
    )
    assert look(slots, slots.restore(path)) == ([1, 2**30 + 7], 0)
    assert look(slots, session) == ([1, 2**30 + 7], 0)


def test_further_slots_are_not_saved(
    path: Path, session: Session, slots: StateSlots[Cache]
) -> None:
    """Values of further slots may be anything, so they begin anew."""
    words = Slot(list[str])
    with slots.borrow(session) as state:
        state.append([1])
        state[words] = ["one"]
    slots.save(session, path)
    with slots.borrow(slots.restore(path)) as state:
        assert state[words] == []


def test_many_rounds(saved: Path, slots: StateSlots[Cache]) -> None:
    """Nothing is left behind, neither in the folder nor of file descriptors."""
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.exists() else 0
    for _ in range(200):
        restored = slots.restore(saved, take=True)
        assert files(saved) == []
        slots.save(restored, saved, move=True)
        assert files(saved) == ["conversation"]
    if before:
        assert len(list(descriptors.iterdir())) == before


# Move and take


def test_move(path: Path, session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A session that was moved to a file is closed, and its KV cache released."""
    prepare(slots, memory, session, 1, 2)
    slots.save(session, path, move=True)
    assert session.closed
    assert not memory.live()
    with pytest.raises(SessionClosedError):
        slots.save(session, path)
    with slots.restore(path, take=True) as restored:
        assert look(slots, restored) == ([1, 2], 2)
    assert files(path) == []


def test_move_out_of_a_registry(path: Path, slots: StateSlots[Cache], memory: Memory) -> None:
    """A session that was moved leaves its registry, and may come back."""
    with SessionRegistry() as registry:
        session = registry.open()
        prepare(slots, memory, session, 1, 2)
        slots.save(session, path, move=True)
        assert session.closed
        assert session.id not in registry
        assert not memory.live()
        registry.add(slots.restore(path, take=True))
        assert look(slots, registry[session.id]) == ([1, 2], 2)


def test_a_release_that_fails(
    path: Path, session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """The session has moved all the same: it is closed, and in the file."""
    prepare(slots, memory, session, 1, 2)
    memory.fail(Fault("release", MemoryError()))
    with pytest.raises(MemoryError):
        slots.save(session, path, move=True)
    assert session.closed
    with slots.restore(path, take=True) as restored:
        assert look(slots, restored) == ([1, 2], 2)


@pytest.mark.parametrize("move", [False, True])
def test_closed_meanwhile(path: Path, session: Session, memory: Memory, *, move: bool) -> None:
    """A session that is closed while it is saved is in the file, whole, and freed when that is done."""

    def dump(cache: Cache, file: BinaryIO) -> None:
        in_thread(session.close)
        assert session.closed
        assert cache.is_live
        memory.dump(cache, file)

    slots = memory.slots()
    object.__setattr__(slots, "dump", dump)
    prepare(slots, memory, session, 1, 2)
    slots.save(session, path, move=move)
    assert not memory.live()
    with slots.restore(path) as restored:
        assert look(slots, restored) == ([1, 2], 2)


def test_take(saved: Path, session: Session, slots: StateSlots[Cache]) -> None:
    """A file is taken once."""
    with slots.restore(saved, take=True) as restored:
        assert restored.id == session.id
    assert files(saved) == []
    with pytest.raises(FileNotFoundError) as caught:
        slots.restore(saved, take=True)
    assert caught.value.filename == os.path.realpath(saved)


def loading(memory: Memory, load: Callable[[BinaryIO], Cache]) -> StateSlots[Cache]:
    """Return an engine with a `load` of its own."""
    return StateSlots(
        create=memory.create,
        length=memory.length,
        dump=memory.dump,
        load=load,
        release=memory.release,
    )


@on_posix
def test_take_what_is_saved_anew(
    saved: Path, session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """A file that is replaced while its KV cache is loaded isn't lost: the newer one is taken."""

    def load(file: BinaryIO) -> Cache:
        if len(loaded) < 2:
            prepare(slots, memory, session, 4)
            slots.save(session, saved)
        loaded.append(memory.load(file))
        return loaded[-1]

    loaded: list[Cache] = []
    other = loading(memory, load)
    with other.restore(saved, take=True) as restored:
        assert look(other, restored) == ([1, 2, 3, 4, 4], 5)
        assert [cache.released for cache in loaded] == [1, 1, 0]
    assert files(saved) == []


@on_posix
def test_take_what_another_takes(saved: Path, memory: Memory) -> None:
    """Whoever comes second to take a file that both have read gets none."""

    def load(file: BinaryIO) -> Cache:
        saved.unlink()
        return memory.load(file)

    other = loading(memory, load)
    with pytest.raises(FileNotFoundError) as caught:
        other.restore(saved, take=True)
    assert caught.value.filename == os.path.realpath(saved)
    assert files(saved) == []


@on_posix
@pytest.mark.parametrize("links", [True, False])
def test_take_what_becomes_another_file(
    saved: Path,
    slots: StateSlots[Cache],
    memory: Memory,
    monkeypatch: pytest.MonkeyPatch,
    *,
    links: bool,
) -> None:
    """What takes the place of a session's file meanwhile is put back, also where there are no hard links."""

    def load(file: BinaryIO) -> Cache:
        saved.unlink()
        saved.write_text("other", "utf-8")
        return memory.load(file)

    def link(*args: object) -> None:
        raise PermissionError

    if not links:
        monkeypatch.setattr(os, "link", link)
    other = loading(memory, load)
    with pytest.raises(SessionFileError):
        other.restore(saved, take=True)
    assert files(saved) == ["conversation"]
    assert saved.read_text("utf-8") == "other"


def test_take_keeps_a_newer_file(saved: Path, session: Session, slots: StateSlots[Cache]) -> None:
    """A file that can't be taken isn't put back over a newer one."""
    claimed = saved.with_name("claimed")
    saved.rename(claimed)
    with slots.borrow(session) as state:
        state.rewind(1)
    slots.save(session, saved)
    _file._put_back(str(claimed), str(saved))
    assert files(saved) == ["conversation"]
    assert slots.restore(saved).token_count == 1


@on_posix
def test_threads_that_take_one_file(saved: Path, slots: StateSlots[Cache]) -> None:
    """Of many threads one gets the session, and the others learn that there's no file."""

    def take() -> Session | None:
        try:
            return slots.restore(saved, take=True)
        except FileNotFoundError:
            return None

    for _ in range(10):
        [taken] = [session for session in race(*[take] * 16) if session is not None]
        assert files(saved) == []
        slots.save(taken, saved, move=True)


@on_posix
def test_threads_that_save_to_one_file(path: Path, slots: StateSlots[Cache]) -> None:
    """The last one's file is there, whole."""
    sessions = [Session() for _ in range(4)]
    for session in sessions:
        with slots.borrow(session) as state:
            state.append([1] * 10_000)
    race(*[partial(slots.save, session, path) for session in sessions])
    assert files(path) == ["conversation"]
    restored = slots.restore(path)
    assert restored.id in {session.id for session in sessions}
    assert restored.token_count == 10_000


@pytest.mark.parametrize("first", [0, 1])
def test_the_later_one_is_there(path: Path, slots: StateSlots[Cache], first: int) -> None:
    """Of two sessions saved at once to one path, the one whose file was complete later is there."""
    with Session() as one, Session() as other:
        order = [one, other] if first == 0 else [other, one]

        def dump(cache: Cache, file: BinaryIO) -> None:
            slots.save(order[1], path)

        slow = StateSlots(create=lambda: Cache([]), length=len_of, dump=dump, load=load_nothing)
        with slow.borrow(order[0]) as state:
            state.append([1])
            state.kv_cache.tokens.append(1)
            state.advance(1)
        slow.save(order[0], path)
        assert slots.restore(path).id == order[0].id
    assert files(path) == ["conversation"]


def len_of(cache: Cache) -> int:
    """Return how many tokens a KV cache covers."""
    return len(cache.tokens)


def load_nothing(file: BinaryIO) -> Cache:
    """Return an empty KV cache."""
    return Cache([])


# What is refused


def test_busy(saved: Path, session: Session, slots: StateSlots[Cache]) -> None:
    """A session that is borrowed isn't saved; its borrow isn't disturbed, and the old file stays."""
    before = saved.read_bytes()
    with slots.borrow(session) as state:
        state.append([4])
        for path in (saved, saved / "below a file", saved.parent / "missing" / "file"):
            with pytest.raises(SessionBusyError):
                slots.save(session, path, move=True)
        state.append([5])
    assert look(slots, session) == ([1, 2, 3, 4, 5], 2)
    assert saved.read_bytes() == before
    assert files(saved) == ["conversation"]


def test_of_another_engine(saved: Path, session: Session) -> None:
    """Only the engine that began a session saves it."""
    other = StateSlots[list[int]](create=list, length=len)
    with pytest.raises(SessionOwnerError):
        other.save(session, saved)
    with pytest.raises(TypeError, match="only a Session can be borrowed, got 'str'"):
        other.save(cast("Session", "session"), saved)


@needs_fork
def test_forked(saved: Path, session: Session, slots: StateSlots[Cache]) -> None:
    """A child process saves none of its parent's sessions, but may restore one from a file."""

    def do() -> None:
        with pytest.raises(SessionForkedError):
            slots.save(session, saved, move=True)
        assert not session.closed
        with slots.restore(saved) as restored:
            assert look(slots, restored) == ([1, 2, 3], 2)

    in_child(do)
    assert look(slots, session) == ([1, 2, 3], 2)


def test_a_cache_of_another_length(
    saved: Path, session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """A KV cache that doesn't belong to the tokens isn't saved."""
    before = saved.read_bytes()
    memory.fail(Fault("length", "too long"))
    with pytest.raises(StateMismatchError):
        slots.save(session, saved)
    assert saved.read_bytes() == before
    assert files(saved) == ["conversation"]


@pytest.mark.parametrize("path", [3, None, 1.5, ["path"]])
def test_no_path(session: Session, slots: StateSlots[Cache], path: object) -> None:
    """Neither a file descriptor nor anything else is taken for a path."""
    with pytest.raises(TypeError, match=r"expected str, bytes or os\.PathLike object"):
        slots.save(session, cast("Path", path))
    with pytest.raises(TypeError, match=r"expected str, bytes or os\.PathLike object"):
        slots.restore(cast("Path", path))


def test_kinds_of_paths(
    tmp_path: Path, session: Session, slots: StateSlots[Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path may be relative, a `str`, a `Path` or `bytes`; one that is relative is so to the folder at the call."""
    monkeypatch.chdir(tmp_path)
    for path in ("text", tmp_path / "path", Path("relative"), cast("str", b"bytes")):
        slots.save(session, path)
        assert slots.restore(path).id == session.id
    assert files(tmp_path / "text") == ["bytes", "path", "relative", "text"]


def test_change_of_folder(
    tmp_path: Path, session: Session, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `dump` that changes the current folder doesn't lead the file astray."""
    monkeypatch.chdir(tmp_path)

    def dump(cache: Cache, file: BinaryIO) -> None:
        os.chdir(tmp_path.parent)
        memory.dump(cache, file)

    slots = memory.slots()
    object.__setattr__(slots, "dump", dump)
    prepare(slots, memory, session, 1)
    slots.save(session, "file")
    session.close()
    assert files(tmp_path / "file") == ["file"]


def test_no_file(path: Path, slots: StateSlots[Cache]) -> None:
    """The error is Python's, and names the path."""
    for take in (False, True):
        with pytest.raises(FileNotFoundError) as caught:
            slots.restore(path, take=take)
        assert caught.value.filename == os.path.realpath(path)


def test_no_folder(path: Path, session: Session, slots: StateSlots[Cache]) -> None:
    """The error names the folder that is missing, or is none."""
    with pytest.raises(FileNotFoundError) as caught:
        slots.save(session, path / "file")
    assert caught.value.filename == os.path.realpath(path)
    path.touch()
    with pytest.raises(OSError, match="conversation"):
        slots.save(session, path / "file")
    assert files(path) == ["conversation"]


@contextmanager
def as_nobody() -> Generator[None, None, None]:
    """Give up the rights of root, which may write anywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@on_posix
def test_a_folder_that_cannot_be_written(session: Session, slots: StateSlots[Cache]) -> None:
    """Nothing is changed if there's no right to make a file, or to take it away."""
    with tempfile.TemporaryDirectory() as directory:
        folder, path = Path(directory), Path(directory, "conversation")
        slots.save(session, path)
        path.chmod(0o644)
        before = path.read_bytes()
        folder.chmod(0o555)
        with as_nobody():
            with pytest.raises(PermissionError):
                slots.save(session, path, move=True)
            with pytest.raises(PermissionError):
                slots.restore(path, take=True)
            assert slots.restore(path).id == session.id
        assert not session.closed
        assert path.read_bytes() == before
        assert files(path) == ["conversation"]
        folder.chmod(0o755)


@on_posix
def test_a_folder_that_cannot_be_read(session: Session, slots: StateSlots[Cache]) -> None:
    """A folder that may only be written to takes and gives files, too, though its entries can't be flushed."""
    with tempfile.TemporaryDirectory() as directory:
        folder, path = Path(directory), Path(directory, "conversation")
        folder.chmod(0o333)
        with as_nobody():
            slots.save(session, path, move=True)
            assert slots.restore(path, take=True).id == session.id
        folder.chmod(0o755)
        assert files(path) == []


@on_posix
def test_readable_by_its_owner_only(saved: Path, session: Session) -> None:
    """Nobody else may read a conversation, even if an older file could be read by all."""
    slots = session._slots
    assert isinstance(slots, StateSlots)
    assert saved.stat().st_mode & 0o777 == 0o600
    saved.chmod(0o666)
    slots.save(session, saved)
    assert saved.stat().st_mode & 0o777 == 0o600


def test_links(saved: Path, session: Session, slots: StateSlots[Cache]) -> None:
    """A path that is a link, also to no file yet, stays one: the file is where it leads to."""
    target, link = saved.with_name("target"), saved.with_name("link")
    try:
        link.symlink_to("target")
    except OSError:
        pytest.skip("no links here")
    for _ in range(2):
        slots.save(session, link)
        assert link.is_symlink()
        assert target.is_file()
    with slots.restore(link, take=True) as restored:
        assert restored.id == session.id
    assert link.is_symlink()
    assert not target.exists()
    link.unlink()
    link.symlink_to("link")
    with pytest.raises(OSError, match="link"):
        slots.save(session, link)
    assert files(saved) == ["conversation", "link"]


def test_a_folder(path: Path, session: Session, slots: StateSlots[Cache]) -> None:
    """A folder is neither replaced nor taken, and no error is as clear as Python's own."""
    path.mkdir()
    with pytest.raises(FileExistsError, match="can't replace what is not a regular file"):
        slots.save(session, path, move=True)
    for take in (False, True):
        with pytest.raises(OSError, match="conversation"):
            slots.restore(path, take=take)
    assert not session.closed
    assert files(path) == ["conversation"]


@on_posix
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_no_regular_file(path: Path, session: Session, slots: StateSlots[Cache], kind: str) -> None:
    """Pipes, sockets and devices are neither replaced nor taken, nor waited for."""
    special = path
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server, pytest.MonkeyPatch.context() as patch:
            patch.chdir(path.parent)  # the path of a socket must be short
            server.bind(path.name)
    else:
        special = Path(os.devnull)
    with pytest.raises(FileExistsError):
        slots.save(session, special, move=True)
    for take in (False, True):
        with pytest.raises(OSError if kind == "socket" else SessionFileError):
            slots.restore(special, take=take)
    assert special.exists()
    assert not session.closed


@on_posix
def test_a_full_disk(saved: Path, session: Session, slots: StateSlots[Cache]) -> None:
    """The old file stays if there is no room for the new one, and the session stays open."""
    import resource  # noqa: PLC0415 not on Windows

    before = saved.read_bytes()
    with slots.borrow(session) as state:
        state.append([5] * 100_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 1, 50, 5000, 399_999):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError, match="too large"):
                slots.save(session, saved, move=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert saved.read_bytes() == before
        assert files(saved) == ["conversation"]
    assert look(slots, session) == ([1, 2, 3] + [5] * 100_000, 2)


# Engines that fail


@pytest.mark.parametrize("after_work", [False, True])
@pytest.mark.parametrize("error", ERRORS)
def test_dump_fails(
    saved: Path,
    session: Session,
    slots: StateSlots[Cache],
    memory: Memory,
    error: type[BaseException],
    *,
    after_work: bool,
) -> None:
    """The error goes on to the caller, the old file stays, and so does the session, with its KV cache."""
    before = saved.read_bytes()
    memory.fail(Fault("dump", error(), after_work=after_work))
    with pytest.raises(error):
        slots.save(session, saved, move=True)
    assert saved.read_bytes() == before
    assert files(saved) == ["conversation"]
    assert look(slots, session) == ([1, 2, 3], 2)
    slots.save(session, saved)


@pytest.mark.parametrize("after_work", [False, True])
@pytest.mark.parametrize("take", [False, True])
@pytest.mark.parametrize("error", [*ERRORS, StopIteration])
def test_load_fails(
    saved: Path,
    slots: StateSlots[Cache],
    memory: Memory,
    caplog: pytest.LogCaptureFixture,
    error: type[BaseException],
    *,
    take: bool,
    after_work: bool,
) -> None:
    """If it's an error, the tokens are restored, with a warning; if it's an interrupt, the file is still there."""
    memory.fail(Fault("load", error(), after_work=after_work))
    if not issubclass(error, Exception):
        with pytest.raises(error):
            slots.restore(saved, take=take)
        assert files(saved) == ["conversation"]
        return
    with slots.restore(saved, take=take) as restored:
        assert look(slots, restored) == ([1, 2, 3], 0)
    raised = "RuntimeError" if error is StopIteration else error.__name__
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("inference_session", logging.WARNING)
    assert record.getMessage() == (
        f"restored session {restored.id} without its KV cache: load raised {raised}"
    )


@pytest.mark.parametrize(
    ("lie", "problem"),
    [("too long", "load raised StateMismatchError"), ("too short", "it covers fewer tokens")],
)
def test_load_lies(
    saved: Path,
    slots: StateSlots[Cache],
    memory: Memory,
    caplog: pytest.LogCaptureFixture,
    *,
    lie: Lie,
    problem: str,
) -> None:
    """A KV cache of another length isn't used, and released."""
    memory.fail(Fault("load", lie))
    with slots.restore(saved) as restored:
        assert look(slots, restored) == ([1, 2, 3], 0)
        assert memory.caches[-1].released == 1
    assert caplog.messages[0].endswith(f" without its KV cache: {problem}")


def test_load_returns_what_another_session_has(
    path: Path, session: Session, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    """One KV cache of two sessions would be released twice: it isn't used."""
    slots = memory.slots()
    prepare(slots, memory, session, 1, 2)
    slots.save(session, path)

    def load(file: BinaryIO) -> Cache:
        return memory.caches[0]

    object.__setattr__(slots, "load", load)
    with slots.restore(path) as restored:
        assert look(slots, restored) == ([1, 2], 0)
    assert caplog.messages[0].endswith("load raised ValueError")
    assert look(slots, session) == ([1, 2], 2)


def test_a_handler_of_logs_that_raises(
    saved: Path, slots: StateSlots[Cache], memory: Memory
) -> None:
    """The error goes on to the caller, and nothing is lost."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise KeyError

    logger, handler = logging.getLogger("inference_session"), Handler()
    logger.addHandler(handler)
    memory.fail(Fault("load", MemoryError()))
    try:
        with pytest.raises(KeyError):
            slots.restore(saved, take=True)
    finally:
        logger.removeHandler(handler)
    assert files(saved) == ["conversation"]


Dump: TypeAlias = Callable[[bytearray, BinaryIO], object]
Load: TypeAlias = Callable[[BinaryIO], bytearray]


def write_all(cache: bytearray, file: BinaryIO) -> None:
    """Write a KV cache."""
    file.write(cache)


def read_all(file: BinaryIO) -> bytearray:
    """Read a KV cache."""
    return bytearray(file.read())


def engine_of_bytes(dump: Dump = write_all, load: Load = read_all) -> StateSlots[bytearray]:
    """Return an engine whose KV caches have a byte for each token."""
    return StateSlots(create=bytearray, length=len, dump=dump, load=load)


def prepare_bytes(slots: StateSlots[bytearray], session: Session, tokens: bytes) -> None:
    """Give a session tokens, all of them cached."""
    with slots.borrow(session) as state:
        state.append(list(tokens))
        state.kv_cache.extend(tokens)
        state.advance(len(tokens))


def close_it(cache: bytearray, file: BinaryIO) -> None:
    """Write a KV cache and close the stream."""
    file.write(cache)
    file.close()


def in_pieces(cache: bytearray, file: BinaryIO) -> None:
    """Write a KV cache in very small pieces, and a large one."""
    file.writelines(cache[position : position + 1] for position in range(100))
    file.flush()
    file.write(memoryview(cache)[100:])


@pytest.mark.parametrize("dump", [close_it, in_pieces])
def test_ways_to_dump(path: Path, session: Session, dump: Dump) -> None:
    """A `dump` may close its stream, and write as it likes."""
    slots, tokens = engine_of_bytes(dump=dump), bytes(range(256)) * 500
    prepare_bytes(slots, session, tokens)
    slots.save(session, path)
    restored = slots.restore(path)
    with slots.borrow(restored) as state:
        assert state.kv_cache == tokens


def test_dump_cannot_go_elsewhere(path: Path) -> None:
    """A `dump` can't write over what is before the KV cache, nor take away the stream."""

    def detach(cache: bytearray, file: BinaryIO) -> None:
        cast("Any", file).detach()

    dumps: list[Dump] = [
        lambda cache, file: file.seek(0),
        lambda cache, file: file.truncate(),
        lambda cache, file: os.write(file.fileno(), cache),
        lambda cache, file: file.read(),
        detach,
    ]
    for dump in dumps:
        slots = engine_of_bytes(dump=dump)
        with Session() as mine:
            prepare_bytes(slots, mine, b"abc")
            with pytest.raises((OSError, ValueError)):
                slots.save(mine, path, move=True)
            assert not mine.closed
    assert files(path) == []


def test_a_late_dump(path: Path, session: Session) -> None:
    """A `dump` that keeps the stream can't write to it later."""
    kept: list[BinaryIO] = []
    slots = engine_of_bytes(dump=lambda cache, file: kept.append(file))
    prepare_bytes(slots, session, b"abc")
    slots.save(session, path)
    with pytest.raises(ValueError, match="closed"):
        kept[0].write(b"abc")


def test_dump_writes_nothing(path: Path, session: Session) -> None:
    """`load` is asked all the same, and finds nothing to read."""
    slots = engine_of_bytes(dump=lambda cache, file: None)
    prepare_bytes(slots, session, b"abc")
    slots.save(session, path)
    assert look_bytes(slots, path) == (3, 0)
    slots = engine_of_bytes(load=lambda file: bytearray(3 + len(file.read())))
    assert look_bytes(slots, path) == (3, 3)


def look_bytes(slots: StateSlots[bytearray], path: Path) -> tuple[int, int]:
    """Restore a session, and return how many tokens it has, and how many of them are cached."""
    with slots.restore(path) as restored, slots.borrow(restored) as state:
        return len(state.token_history), state.kv_length


def test_ways_to_load(path: Path, session: Session) -> None:
    """A `load` may close its file, read it by its descriptor, or leave some of it."""

    def close(file: BinaryIO) -> bytearray:
        with file:
            return bytearray(file.read())

    def by_descriptor(file: BinaryIO) -> bytearray:
        with open(os.dup(file.fileno()), "rb") as same:  # noqa: PTH123
            same.seek(file.tell())
            return bytearray(same.read())

    slots = engine_of_bytes()
    prepare_bytes(slots, session, b"abc")
    slots.save(session, path)
    loads: list[Load] = [close, by_descriptor, lambda file: bytearray(3)]
    for load in loads:
        assert look_bytes(engine_of_bytes(load=load), path) == (3, 3)


def test_no_warnings(path: Path, session: Session, slots: StateSlots[Cache]) -> None:
    """No file and no session is left open, whatever fails."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path.write_text("nothing")
        for fail in (
            partial(slots.restore, path),
            partial(slots.save, session, path.parent),
            partial(slots.save, cast("Session", None), path),
        ):
            with pytest.raises((SessionError, OSError, TypeError)):
                fail()
        gc.collect()
    assert not caught
