"""Files of sessions: one conversation each, whole or not there.

A file is written beside its place, flushed to the disk, and renamed: its place holds the old one or the new one. To
take a session is to rename its file, too, after the session was made from it: only one process can do so. The page
`docs/file-format.md` describes the format.
"""

import errno
import logging
import os
import stat
from array import array
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from io import BufferedReader, BufferedWriter, RawIOBase
from struct import Struct
from sys import byteorder
from typing import TYPE_CHECKING, Any, BinaryIO, Final
from uuid import UUID, uuid4
from zlib import crc32

from attrs import evolve, field, frozen

from inference_session._borrow import ANY_KEY, BorrowedState
from inference_session._lease import nobody
from inference_session._session import CacheFunctions, Session
from inference_session._tokens import NO_TOKENS
from inference_session._transaction import adopt, begin, check_length
from inference_session.exceptions import SessionFileError


if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_log: Final = logging.getLogger("inference_session")

_MAGIC: Final = b"\x89session"
_VERSION: Final = 1
_FIXED: Final = Struct("<8sI16sIQQQII")
"""The fields of the head, with the length of the key in the place of the key."""
_CHECKSUM: Final = Struct("<I")
_PIECE: Final = 1 << 18  # bytes: fits the processor's caches


@frozen
class _Head:
    """The beginning of a file. The tokens follow, then the KV cache."""

    id: UUID
    key: str = field(repr=False)
    count: int
    """How many tokens there are."""
    covered: int = 0
    """How many of them the KV cache covers."""
    nbytes: int = 0
    """The size of the KV cache in the file."""
    tokens_checksum: int = field(default=0, repr=False)
    cache_checksum: int = field(default=0, repr=False)

    def to_bytes(self) -> bytes:
        key = self.key.encode("utf-8", "surrogatepass")
        numbers = (self.count, self.covered, self.nbytes, self.tokens_checksum, self.cache_checksum)
        head = _FIXED.pack(_MAGIC, _VERSION, self.id.bytes, len(key), *numbers) + key
        return head + _CHECKSUM.pack(crc32(head))


def save(slots: CacheFunctions[Any], session: Session, path: str, *, move: bool) -> None:
    """Write a session to a file. See `StateSlots.save`."""
    path = os.path.realpath(path)
    temporary = _beside(path)
    moved = False
    try:
        with BorrowedState(session, slots, ANY_KEY) as state:
            check_length(session, slots, state._lease, session._kv_length, "commit")
            _check_place(path)
            with open(temporary, "xb", opener=_PRIVATE) as file:
                _write(file, slots, session)
                file.flush()
                os.fsync(file.fileno())
            for _ in map(os.replace, (temporary,), (path,)):
                moved = move
            _flush_folder(path)
            if moved:
                session.close()
    finally:
        if moved:  # an interrupt may have come before the session was closed
            session.close()
        with suppress(OSError):  # it has its new name, or was never made
            os.unlink(temporary)  # noqa: PTH108


def restore(slots: CacheFunctions[Any], path: str, *, take: bool) -> Session:
    """Read a session from a file. See `StateSlots.restore`."""
    path = os.path.realpath(path)
    taken = _beside(path)
    while True:
        session, head = _read(slots, path)
        if not take:
            return session
        try:
            os.rename(path, taken)  # noqa: PTH104
            if _head_of(taken) == head:
                [_] = map(os.unlink, (taken,))  # in one instant with the return
                return session
            _give_up(session, taken, path)  # it was saved anew meanwhile
        except BaseException as error:
            _give_up(session, taken, path)
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
            raise


def _beside(path: str) -> str:
    """Return a new path in the same folder."""
    return os.path.join(os.path.dirname(path), f".session-{uuid4().hex}")  # noqa: PTH118, PTH120


# Writing


_PRIVATE: Final = partial(os.open, mode=0o600)
"""Opens a new file that its owner alone may read. It's a C function: no interrupt can lose the file descriptor."""


def _check_place(path: str) -> None:
    """Raise an error if the folder is missing, or the path leads to a folder, a pipe or a device."""
    os.stat(os.path.dirname(path))  # noqa: PTH116, PTH120
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
            raise FileExistsError(errno.EEXIST, "can't replace what is not a regular file", path)


def _write(file: BufferedWriter, slots: CacheFunctions[Any], session: Session) -> None:
    """Write the tokens and the KV cache, and at last the head, which has their checksums."""
    head = _Head(session._id, session._key, len(session._token_history))
    file.seek(len(head.to_bytes()))
    head = evolve(head, tokens_checksum=_write_tokens(file, session))
    if slots.dump is not None and session._kv_length:
        part = _CachePart(file)
        with BufferedWriter(part) as stream:
            slots.dump(session._kv_cache, stream)
        head = evolve(
            head,
            covered=session._kv_length,
            nbytes=part.nbytes,
            cache_checksum=part.checksum,
        )
    file.seek(0)
    file.write(head.to_bytes())


def _write_tokens(file: BufferedWriter, session: Session) -> int:
    """Write the tokens, and return their checksum. All is done by C functions, whose frames no traceback shows."""
    tokens = session._token_history
    try:
        if byteorder == "big":
            tokens = tokens[:]
            tokens.byteswap()
        file.write(tokens)
        return crc32(tokens)
    finally:
        tokens = NO_TOKENS  # a traceback keeps this frame


class _CachePart(RawIOBase):
    """Writes the KV cache into a file, and has its size and checksum. It lends out no file descriptor."""

    def __init__(self, file: BufferedWriter) -> None:
        self._file = file
        self.nbytes = self.checksum = 0

    def writable(self) -> bool:
        return True

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            self.checksum = crc32(data, self.checksum)
            written = self._file.write(data)
        finally:
            del data  # a traceback keeps this frame
        self.nbytes += written
        return written


def _flush_folder(path: str) -> None:
    """Flush the name of a file to the disk, if its folder may be read. Windows opens no folders."""
    try:
        # In one instant, or an interrupt could lose the file descriptor.
        [folder] = map(os.open, (os.path.dirname(path),), (os.O_RDONLY,))  # noqa: PTH120
    except PermissionError:
        return
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# Reading


def _read(slots: CacheFunctions[Any], path: str) -> tuple[Session, _Head]:
    session = None
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            head = _read_head(file, path)
            session = Session.with_id(head.id)
            _read_tokens(file, path, head, session)
            begin(session, slots, head.key)
            if head.covered:
                _read_cache(file, slots, head, session)
    except BaseException:
        if session is not None:
            session.close()
        raise
    return session, head


def _give_up(session: Session, taken: str, path: str) -> None:
    try:
        _put_back(taken, path)
    finally:
        session.close()


def _put_back(taken: str, path: str) -> None:
    """Give a file back its name, unless there is a newer one."""
    try:
        os.link(taken, path)
    except FileNotFoundError:  # it wasn't taken
        return
    except FileExistsError:
        pass
    except OSError:  # no hard links here
        os.replace(taken, path)  # noqa: PTH105
        return
    os.unlink(taken)  # noqa: PTH108


def _without_waiting(path: str, flags: int) -> int:
    """Open a file. A pipe is opened at once, too, and refused after that; Windows has none in folders."""
    # In one instant, or an interrupt could lose the file descriptor.
    [descriptor] = map(os.open, (path,), (flags | getattr(os, "O_NONBLOCK", 0),))
    return descriptor


def _head_of(path: str) -> _Head:
    with open(path, "rb", opener=_without_waiting) as file:
        return _read_head(file, path)


def _read_head(file: BufferedReader, path: str) -> _Head:
    status = os.fstat(file.fileno())
    fixed = file.read(_FIXED.size) if stat.S_ISREG(status.st_mode) else b""
    if not fixed.startswith(_MAGIC):
        raise SessionFileError(path, "it isn't the file of a session")
    if len(fixed) < _FIXED.size:
        raise _damaged(path)
    _, version, id_bytes, key_length, count, covered, *numbers = _FIXED.unpack(fixed)
    if version != _VERSION:
        raise SessionFileError(path, f"its format is {version}, and only {_VERSION} is known here")
    if status.st_size < len(fixed) + key_length + _CHECKSUM.size + 4 * count:
        raise _damaged(path)
    key = _read_key(file, path, key_length, crc32(fixed))
    if covered > count:
        raise _damaged(path)
    return _Head(UUID(bytes=id_bytes), key, count, covered, *numbers)


def _read_key(file: BufferedReader, path: str, length: int, checksum: int) -> str:
    """Read the key, and compare the checksum of all so far."""
    key = file.read(length)
    try:
        if file.read(_CHECKSUM.size) == _CHECKSUM.pack(crc32(key, checksum)):
            return key.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        pass
    finally:
        key = b""  # a traceback keeps this frame, and with a wrong length, these may be tokens
    raise _damaged(path)


def _read_tokens(file: BufferedReader, path: str, head: _Head, session: Session) -> None:
    """Read the tokens into a session. All is done by C functions, whose frames no traceback shows."""
    tokens = array("i", [0]) * head.count
    try:
        file.readinto(tokens)
        intact = crc32(tokens) == head.tokens_checksum
        if byteorder == "big":
            tokens.byteswap()
        if not intact or min(tokens, default=0) < 0:
            raise _damaged(path)
        session._token_history = tokens
    finally:
        tokens = NO_TOKENS  # a traceback keeps this frame


def _damaged(path: str) -> SessionFileError:
    return SessionFileError(path, "its head or its tokens are damaged")


def _read_cache(
    file: BufferedReader, slots: CacheFunctions[Any], head: _Head, session: Session
) -> None:
    """Load the KV cache; if it can't be used, the tokens stay pending."""
    start = file.tell()
    if slots.load is None:
        problem = "there is no load"
    elif _rest_of(file) != (head.nbytes, head.cache_checksum):
        problem = "it is damaged"
    else:
        file.seek(start)
        problem = _load(file, slots, slots.load, head, session)
    if problem:
        _log.warning("restored session %s without its KV cache: %s", session._id, problem)


def _rest_of(file: BufferedReader) -> tuple[int, int]:
    """Return the size and the checksum of the rest of a file."""
    nbytes = checksum = 0
    piece = bytearray(_PIECE)
    try:
        while size := file.readinto(piece):
            checksum = crc32(memoryview(piece)[:size], checksum)
            nbytes += size
    finally:
        del piece  # a traceback keeps this frame
    return nbytes, checksum


def _load(
    file: BufferedReader,
    slots: CacheFunctions[Any],
    load: Callable[[BinaryIO], Any],
    head: _Head,
    session: Session,
) -> str:
    """Return why the KV cache can't be used; nothing if the session has it now."""
    try:
        adopt(session, slots, map(load, (file,)), head.covered, "load")
        if session._kv_length == head.covered:
            return ""
        session._release_cache(nobody)
    except Exception as error:  # noqa: BLE001 the tokens are safe; it's computed anew
        return f"load raised {type(error).__name__}"
    return "it covers fewer tokens"
