"""Files keep a conversation whatever strikes: interrupts, SIGKILL, many processes, and changes to any byte of them."""

import os
import struct
import sys
import traceback
from array import array
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.caches import Cache, Memory, look
from tests.interrupts import Interrupt, Interrupter
from tests.processes import run_python, run_script
from tests.test_fork import needs_fork
from tests.tracked_engines import END, Books, MutableCache

from inference_session import Session
from inference_session.engine import StateSlots
from inference_session.exceptions import SessionFileError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give the path of a file in a folder of its own, in which nothing else may be left."""
    tmp_path.joinpath("folder").mkdir()
    return tmp_path / "folder" / "conversation"


# Interrupts


class Story:
    """A session, the file of an earlier state of it, and what is done with them."""

    def __init__(self, path: Path, *tokens: int) -> None:
        self.path = path
        self.newer = path.parent.with_name("newer")
        """A file of its present state, to take the place of the other."""
        self.books = Books([MutableCache() for _ in range(3)])
        self.slots = StateSlots(
            create=self.books.left.pop,
            length=len,
            dump=self.dump,
            load=self.load,
            release=self.books.released.append,
        )
        self.session = Session()
        self.restored: Session | None = None
        self.replaces = False
        with self.slots.borrow(self.session) as state:
            state.append(tokens)
            state.kv_cache.extend(tokens)
            state.advance(len(tokens))

    @staticmethod
    def dump(cache: MutableCache, file: BinaryIO) -> None:
        """Write a KV cache."""
        file.write(array("i", cache))

    def load(self, file: BinaryIO) -> MutableCache:
        """Read a KV cache; meanwhile, the file may be replaced."""
        if self.replaces:
            self.replaces = False
            os.replace(self.newer, self.path)  # noqa: PTH105
        tokens = array("i")
        tokens.frombytes(file.read())
        cache = MutableCache(tokens)
        self.books.made[END:] = (cache,)
        return cache

    def save(self) -> None:
        """Save the session."""
        self.slots.save(self.session, self.path)

    def move(self) -> None:
        """Move the session to the file."""
        self.slots.save(self.session, self.path, move=True)

    def restore(self) -> None:
        """Restore a session."""
        self.restored = self.slots.restore(self.path)

    def take(self) -> None:
        """Take the file."""
        self.restored = self.slots.restore(self.path, take=True)

    def take_anew(self) -> None:
        """Take a file that is replaced while it is read."""
        self.replaces = True
        self.take()

    def tokens_of(self, session: Session) -> list[int]:
        """Return the tokens of a session that is free, and has the right KV cache."""
        with self.slots.borrow(session) as state:
            assert state.kv_cache == list(state.token_history)
            return list(state.token_history)

    def in_file(self, path: Path) -> list[int]:
        """Return the tokens in a file."""
        self.replaces = False
        with self.slots.restore(path) as session:
            return self.tokens_of(session)

    def check(self) -> None:
        """Require the conversation to be in the file or in a session, whole, and nothing to be left behind."""
        found = list(self.path.parent.iterdir())
        assert found == ([self.path] if self.restored is None else [])
        if self.restored is not None:
            assert self.tokens_of(self.restored) in ([1, 2], [1, 2, 3])
        elif self.session.closed:
            assert self.in_file(self.path) == [1, 2, 3]
        else:
            assert self.in_file(self.path) in ([1, 2], [1, 2, 3])
            assert self.tokens_of(self.session) == [1, 2, 3]

    def check_not_lost(self) -> None:
        """Require the conversation to be in a file, wherever, or in a session, whole."""
        found = list(self.path.parent.iterdir())
        assert self.path in found or self.restored is not None or len(found) == 1
        for path in {self.path} & {*found} or found:
            assert self.in_file(path) in ([1, 2], [1, 2, 3])
        if not self.session.closed:
            assert self.tokens_of(self.session) == [1, 2, 3]

    def close(self) -> None:
        """Close all sessions, and require every KV cache to be released once."""
        self.session.close()
        if self.restored is not None:
            self.restored.close()
        self.books.check()


ACTIONS = [Story.save, Story.move, Story.restore, Story.take, Story.take_anew]


def descriptors() -> int:
    """Return how many files are open, where the system tells."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


@pytest.fixture
def begin(path: Path) -> Callable[[], Story]:
    """Return a function that begins a story, with nothing else in the folder of the file."""
    contents: list[bytes] = []
    for tokens in ([1, 2], [1, 2, 3]):
        story = Story(path, *tokens)
        story.save()
        story.close()
        contents.append(path.read_bytes())

    def begin() -> Story:
        for left in path.parent.iterdir():
            left.unlink()
        story = Story(path, *tokens)
        path.write_bytes(contents[0])
        story.newer.write_bytes(contents[1])
        return story

    return begin


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
def test_an_interrupt_at_every_delivery_point(
    interrupter: Interrupter,
    begin: Callable[[], Story],
    swallowed: list[object],
    action: Callable[[Story], None],
) -> None:
    """Wherever an interrupt comes, the file is whole, the session in one place, and nothing is left behind."""
    for point in count(1):
        story = begin()
        before = descriptors()
        error = interrupter.run(partial(action, story), point)
        if interrupter.reached < point:
            assert point > 30, "the delivery points are not seen"
            story.close()
            break
        where = "".join(traceback.format_exception(error)[-6:])
        if error is not None:
            error.__traceback__ = error.__context__ = None
        try:
            story.check()
            story.close()
            assert descriptors() == before
        except BaseException as failure:
            failure.add_note(f"interrupted at delivery point {point}: {where}")
            raise
    assert set(swallowed) <= {Interrupt}, "not in a finalizer of a session that was given up"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="a profile function raises only once")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
def test_two_interrupts(
    interrupter: Interrupter,
    begin: Callable[[], Story],
    swallowed: list[object],
    action: Callable[[Story], None],
) -> None:
    """Even if a second one comes while the first is dealt with, the conversation is somewhere, whole."""
    interrupted_twice = 0
    for point in count(1):
        story = begin()
        distance = 1 + point % 5
        error = interrupter.run(partial(action, story), point, point + distance)
        if interrupter.reached < point:
            story.close()
            break
        interrupted_twice += interrupter.reached >= point + distance
        # The counter of delivery points has looked at the leases, and its frames are in the tracebacks.
        while error is not None:
            error.__traceback__, error = None, error.__context__
        story.check_not_lost()
        story.close()
    assert interrupted_twice > 10
    assert set(swallowed) <= {Interrupt}


# Processes


@needs_fork
@pytest.mark.parametrize("work", ["save", "move", "take", "share"])
def test_processes(work: str) -> None:
    """No SIGKILL loses or tears a conversation, and of 16 processes that take one file, one gets it."""
    done = run_script("files", work, "1", "10" if work == "share" else "70", measured=False)
    assert done.returncode == 0, done.stderr


MEMORY = """
import re, sys
from pathlib import Path
from inference_session import Session
from inference_session.engine import StateSlots

def peak():
    return int(re.search("VmHWM:(.*)kB", Path("/proc/self/status").read_text())[1])

def dump(cache, file):
    file.write(cache)

def create():
    return b"x" * (512 << 20)

slots = StateSlots(create=create, length=lambda _: tokens, dump=dump, load=lambda file: file.read())
session, tokens = Session(), 0
with slots.borrow(session) as state:
    state.append([1])
    cache = state.kv_cache
    tokens = 1
    state.advance(1)
with open("/dev/null", "wb") as file:
    dump(cache, file)
before = peak()
slots.save(session, sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no measure of memory here")
def test_memory(path: Path) -> None:
    """A KV cache of 512 MB is saved without a copy in memory."""
    done = run_python("-c", MEMORY, path, measured=False)
    assert path.stat().st_size > 512 << 20
    path.unlink()
    assert int(done.stdout) < 64 << 10


# Whoever changes a byte


HEAD = struct.Struct("<8sI16sIQQQII")


@pytest.fixture
def content(path: Path, session: Session, slots: StateSlots[Cache], memory: Memory) -> bytes:
    """Give the content of a file: three tokens, two of them cached."""
    with slots.borrow(session, key="key") as state:
        memory.step(state, 1, 2)
        state.append([3])
    slots.save(session, path)
    session.close()
    return path.read_bytes()


def restored(slots: StateSlots[Cache], path: Path, content: bytes) -> list[int] | None:
    """Return the tokens in a file, None if it's refused; require the KV cache to be right if there's one."""
    path.write_bytes(content)
    try:
        session = slots.restore(path)
    except SessionFileError:
        return None
    with session, slots.borrow(session, key="key") as state:
        tokens = list(state.token_history)
        assert all(0 <= token < 2**31 for token in tokens)
        assert not state.kv_length or state.kv_length == len(state.kv_cache.tokens)
        state.append([7])
        state.rewind(0)
    return tokens


def test_every_flip(path: Path, content: bytes, slots: StateSlots[Cache], memory: Memory) -> None:
    """Whichever byte is another: the file is refused, or the tokens are right, and the KV cache is never loaded."""
    results: list[list[int] | None] = []
    for position in range(len(content)):
        for change in (1, 0x80, 0xFF):
            damaged = bytearray(content)
            damaged[position] ^= change
            results.append(restored(slots, path, bytes(damaged)))
    assert results == [None] * 3 * 83 + [[1, 2, 3]] * 3 * 8
    assert len(memory.caches) == 1, "a damaged KV cache was loaded"


def test_every_prefix(path: Path, content: bytes, slots: StateSlots[Cache]) -> None:
    """However much is missing at the end, or has been added."""
    results = [restored(slots, path, content[:length]) for length in range(len(content))]
    assert results == [None] * 83 + [[1, 2, 3]] * 8
    assert restored(slots, path, content + b"x") == [1, 2, 3]


def mended(content: bytes) -> bytes:
    """Return a file with the right checksums, whatever else is in its head."""
    fields = [*HEAD.unpack(content[:64].ljust(64, b"\0"))]
    key, start = content[64 : 64 + fields[3]], 68 + fields[3]
    end = start + 4 * fields[4]
    fields[:2] = [b"\x89session", 1]
    fields[6:] = [len(content[end:]), crc32(content[start:end]), crc32(content[end:])]
    head = HEAD.pack(*fields) + key
    return head + struct.pack("<I", crc32(head)) + content[start:]


Splice = tuple[int, int, bytes]
splices = st.lists(
    st.tuples(st.integers(0, 91), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=4
)
"""Where, how many bytes are taken out, and which ones put in."""

fuzzed = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300
)


def spliced(content: bytes, splices: list[Splice]) -> bytes:
    """Return the content with some changes."""
    for start, dropped, added in splices:
        content = content[:start] + added + content[start + dropped :]
    return content


@fuzzed
@given(splices)
def test_splices(
    path: Path, content: bytes, slots: StateSlots[Cache], splices: list[Splice]
) -> None:
    """A file with random changes is refused, or its tokens are right."""
    assert restored(slots, path, spliced(content, splices)) in (None, [1, 2, 3])


@fuzzed
@given(splices)
@example([(32, 8, (2**61).to_bytes(8, "little"))])
@example([(28, 4, b"\xff\xff\xff\xff")])
@example([(40, 1, b"\4")])
@example([(74, 1, b"\xff")])
def test_forgeries(
    path: Path, content: bytes, slots: StateSlots[Cache], splices: list[Splice]
) -> None:
    """One whose checksums are right all the same is refused, or has valid tokens, and serves as any session."""
    restored(slots, path, mended(spliced(content, splices)))


def test_splices_of_two(path: Path, content: bytes, slots: StateSlots[Cache]) -> None:
    """A file that begins as one and goes on as another is refused, or has the tokens of the first."""
    with Session() as other:
        with slots.borrow(other) as state:
            state.append([4, 5, 6])
        slots.save(other, path)
    second = path.read_bytes()
    for cut in range(len(content)):
        assert restored(slots, path, content[:cut] + second[cut:]) in (None, [1, 2, 3], [4, 5, 6])
        assert restored(slots, path, second[:cut] + content[cut:]) in (None, [1, 2, 3], [4, 5, 6])


# What is no file of a session


def forge(ids: list[int], **changes: int) -> bytes:
    """Return a file with the given tokens, and other numbers in its head, whose checksums are right."""
    tokens = struct.pack(f"<{len(ids)}i", *ids)
    numbers = {
        "version": 1,
        "key": 0,
        "count": len(ids),
        "covered": 0,
        "nbytes": 0,
        "tokens": crc32(tokens),
        "cache": 0,
        **changes,
    }
    version, key, *others = numbers.values()
    head = struct.pack("<8sI16sIQQQII", b"\x89session", version, bytes(16), key, *others)
    return head + struct.pack("<I", crc32(head)) + tokens


def test_forge(path: Path, slots: StateSlots[Cache]) -> None:
    """The files below differ from a right one in one thing only."""
    path.write_bytes(forge([1, 2]))
    assert look(slots, slots.restore(path)) == ([1, 2], 0)


@pytest.mark.parametrize("version", [0, 2, 2**32 - 1])
def test_other_versions(path: Path, slots: StateSlots[Cache], version: int) -> None:
    """A file of another format is refused, and the error says so."""
    path.write_bytes(forge([], version=version))
    with pytest.raises(SessionFileError, match=f"format is {version}, and only 1 is known"):
        slots.restore(path)


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x1a\n" + bytes(100), b"\x89sessio", bytes(1000)]
)
def test_other_files(path: Path, slots: StateSlots[Cache], content: bytes) -> None:
    """Anything else is refused, and stays."""
    path.write_bytes(content)
    with pytest.raises(SessionFileError, match="it isn't the file of a session") as caught:
        slots.restore(path, take=True)
    assert caught.value.path == os.path.realpath(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("tokens", "changes"),
    [
        ([1, -2], {}),
        ([-(2**31)], {}),
        ([1, 2], {"count": 2**64 - 1}),
        ([1, 2], {"count": 2**62}),
        ([1, 2], {"count": 3}),
        ([1, 2], {"count": 1}),
        ([1, 2], {"covered": 3}),
        ([1, 2], {"key": 2**32 - 1}),
        ([1, 2], {"tokens": 0}),
    ],
)
def test_forged(
    path: Path, slots: StateSlots[Cache], tokens: list[int], changes: dict[str, int]
) -> None:
    """Numbers that can't be true, and tokens that are none, are refused before they do any harm."""
    path.write_bytes(forge(tokens, **changes))
    with pytest.raises(SessionFileError, match="its head or its tokens are damaged"):
        slots.restore(path)


def test_key_that_is_no_text(path: Path, slots: StateSlots[Cache]) -> None:
    """A key that isn't UTF-8 is refused, though its checksum is right."""
    head = forge([], key=1)[:64] + b"\xff"
    path.write_bytes(head + struct.pack("<I", crc32(head)))
    with pytest.raises(SessionFileError, match="damaged"):
        slots.restore(path)


@pytest.mark.parametrize(("nbytes", "checksum"), [(2**64 - 1, 0), (9, 0), (8, 1), (7, 0)])
def test_forged_cache(
    path: Path,
    slots: StateSlots[Cache],
    caplog: pytest.LogCaptureFixture,
    nbytes: int,
    checksum: int,
) -> None:
    """A KV cache that isn't as long or not as it should be never comes to `load`."""
    cache = struct.pack("<2i", 1, 2)
    numbers = {"covered": 2, "nbytes": nbytes, "cache": crc32(cache) ^ checksum}
    content = forge([1, 2], **numbers) + cache
    path.write_bytes(content)
    assert look(slots, slots.restore(path)) == ([1, 2], 0)
    assert caplog.messages[0].endswith("without its KV cache: it is damaged")
