"""The page about the format of files describes the files that the library writes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inference_session import Session
from inference_session.engine import StateSlots


PAGE = Path(__file__).parents[2].joinpath("docs", "file-format.md").read_text("utf-8")
READER = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[0]
SLOTS = StateSlots(
    create=bytearray,
    length=len,
    dump=lambda cache, file: file.write(cache),
    load=lambda file: bytearray(file.read()),
)


@pytest.fixture
def read() -> Callable[[Path], object]:
    """Return the reader that the page shows."""
    names: dict[str, Any] = {}
    exec(READER, names)
    reader: Callable[[Path], object] = names["read"]
    return reader


def save(path: Path, tokens: list[int], cache: bytes, key: str) -> Session:
    """Save a session, and return it."""
    with Session() as session:
        with SLOTS.borrow(session, key=key) as state:
            state.append(tokens)
            state.kv_cache.extend(cache)
            state.advance(len(cache))
        SLOTS.save(session, path)
    return session


def test_the_reader_is_short() -> None:
    """It has thirty lines at most."""
    assert len(READER.splitlines()) <= 30


@pytest.mark.parametrize("key", ["", "a@7", "ключ", "\ud800"])
@pytest.mark.parametrize(
    ("tokens", "cache"), [([], b""), ([0, 2**31 - 1], b""), ([*range(5000)], b"kv" * 2000)]
)
def test_the_reader_reads(
    tmp_path: Path, read: Callable[[Path], object], tokens: list[int], cache: bytes, key: str
) -> None:
    """It finds in a file what was saved."""
    session = save(tmp_path / "file", tokens, cache, key)
    expected = (session.id, key, tuple(tokens), len(cache), cache)
    assert read(tmp_path / "file") == expected


def test_the_reader_refuses(tmp_path: Path, read: Callable[[Path], object]) -> None:
    """It refuses what the library refuses, and passes over the KV cache where the library does."""
    path = tmp_path / "file"
    session = save(path, [1, 2, 3], b"kv", "key")
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content[:position] + b"\xee" + content[position + 1 :])
        if position < len(content) - 2:
            with pytest.raises(ValueError, match=r"session|version|damaged"):
                SLOTS.restore(path)
            with pytest.raises(ValueError, match=r"session|version|damaged"):
                read(path)
        else:
            assert SLOTS.restore(path).token_count == 3
            assert read(path) == (session.id, "key", (1, 2, 3), 0, b"")


def test_the_table(tmp_path: Path) -> None:
    """The fields are where the table says."""
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (.*?) \|$", PAGE, re.MULTILINE)
    ends = [0, *(int(start) + int(size) for start, size, _ in rows)]
    assert [int(start) for start, _, _ in rows] == ends[:-1]
    assert ends[-1] == 64
    magic = bytes.fromhex(rows[0][2].partition("`")[2].partition("`")[0])
    session = save(tmp_path / "file", [1], b"", "")
    assert (tmp_path / "file").read_bytes().startswith(magic + b"\1\0\0\0" + session.id.bytes)
