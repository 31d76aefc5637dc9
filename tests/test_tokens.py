"""Token ids: whatever holds ints is taken, whatever doesn't is refused, and common prefixes are found exactly."""

from __future__ import annotations

import ctypes
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_session import Session
from inference_session.engine import BorrowedState, StateSlots


LARGEST = 2**31 - 1
SLOTS = StateSlots[list[int]](
    create=list, length=len, truncate=lambda cache, length: cache[:length]
)


@pytest.fixture
def state() -> Iterator[BorrowedState[list[int]]]:
    """Give a state with two tokens."""
    with Session() as session, SLOTS.borrow(session) as state:
        state.append([7, 8])
        yield state


class Index:
    """An integer of a foreign type, as NumPy's and PyTorch's scalars are."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


class Tensor:
    """A tensor, as PyTorch has it: no buffer, but a `tolist`."""

    def __init__(self, data: object) -> None:
        self.data = data

    def tolist(self) -> object:
        """Return the data."""
        return self.data


class Tokens(list[int]):
    """A list of one's own."""


class Failing:
    """What should be an int, but fails."""

    def __index__(self) -> int:
        raise RuntimeError("CUDA error")


class Once:
    """An int that is another one when it's read again."""

    def __init__(self, *values: int) -> None:
        self.values = list(values)

    def __index__(self) -> int:
        return self.values.pop(0) if len(self.values) > 1 else self.values[0]


def generate(*tokens: int) -> Iterator[int]:
    """Return a generator."""
    yield from tokens


def arrays(typecode: str) -> Callable[[], Any]:
    """Return what makes an array."""
    return lambda: array(typecode, [1, 2, 3])


def views(typecode: str) -> Callable[[], Any]:
    """Return what makes a buffer."""
    return lambda: memoryview(array(typecode, [1, 2, 3]))


def strided(typecode: str) -> Callable[[], Any]:
    """Return what makes a buffer whose items don't lie side by side."""
    return lambda: memoryview(array(typecode, [1, 0, 2, 0, 3, 0]))[::2]


def append(state: BorrowedState[list[int]], tokens: Any) -> None:
    """Add tokens."""
    state.append(tokens)


def reuse_prefix(state: BorrowedState[list[int]], tokens: Any) -> None:
    """Go on with tokens."""
    state.reuse_prefix(tokens)


GOOD: dict[str, Callable[[], Any]] = {
    "list": lambda: [1, 2, 3],
    "own list": lambda: Tokens([1, 2, 3]),
    "tuple": lambda: (1, 2, 3),
    "range": lambda: range(1, 4),
    "generator": lambda: generate(1, 2, 3),
    "iterator": lambda: iter((1, 2, 3)),
    "map": lambda: map(int, "123"),
    "deque": lambda: deque([1, 2, 3]),
    "dict keys": {1: 0, 2: 0, 3: 0}.keys,
    **{f"array {code}": arrays(code) for code in "bBhHiIlLqQ"},
    **{f"view {code}": views(code) for code in "BiIq"},
    **{f"strided {code}": strided(code) for code in "iq"},
    "read-only view": lambda: memoryview(array("i", [1, 2, 3])).toreadonly(),
    "ctypes": lambda: (ctypes.c_int * 3)(1, 2, 3),
    "ctypes 64": lambda: (ctypes.c_int64 * 3)(1, 2, 3),
    "tensor": lambda: Tensor([1, 2, 3]),
    "foreign ints": lambda: [Index(1), Index(2), Index(3)],
    "bools among ints": lambda: [True, 2, 3],
    "a buffer of bytes that is cast": lambda: memoryview(array("i", [1, 2, 3]).tobytes()).cast("i"),
}
GOOD_TOKENS = pytest.mark.parametrize("make", GOOD.values(), ids=GOOD.keys())


@GOOD_TOKENS
def test_append_takes_whatever_holds_ints(
    state: BorrowedState[list[int]], make: Callable[[], Any]
) -> None:
    """Tokenizers return lists, arrays, tensors and more; all are taken, and become plain ints."""
    state.append(make())
    assert state.token_history == [7, 8, 1, 2, 3]
    assert {type(token) for token in state.token_history} == {int}


@GOOD_TOKENS
def test_reuse_prefix_takes_whatever_holds_ints(
    state: BorrowedState[list[int]], make: Callable[[], Any]
) -> None:
    """What can be appended can be compared with the history."""
    state.rewind(0)
    state.append([1, 2, 9])
    state.kv_cache.extend([1, 2, 9])
    state.advance(3)
    assert state.reuse_prefix(make()) == 2
    assert state.token_history == [1, 2, 3]
    assert {type(token) for token in state.token_history} == {int}


@pytest.mark.parametrize(
    "empty",
    [[], (), range(0), iter(()), array("i"), array("q"), memoryview(array("i")), Tensor([])],
    ids=["list", "tuple", "range", "iterator", "array", "array q", "view", "tensor"],
)
def test_no_tokens(state: BorrowedState[list[int]], empty: Any) -> None:
    """Nothing is a fine number of tokens."""
    state.append(empty)
    assert state.token_history == [7, 8]


MAKERS: dict[str, Callable[[list[int]], Any]] = {
    "list": list[int],
    "tuple": tuple[int, ...],
    "array": lambda it: array("i", it),
}


@pytest.mark.parametrize("number", [1, 15, 16, 17, 1000])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_extreme_tokens(
    state: BorrowedState[list[int]], make: Callable[[list[int]], Any], number: int
) -> None:
    """The smallest and the largest ids are as good as others."""
    tokens = [0, LARGEST] * number
    state.append(make(tokens))
    state.append(make([LARGEST]))
    state.append(make([0]))
    assert state.token_history == [7, 8, *tokens, LARGEST, 0]


def test_what_was_passed_is_copied(state: BorrowedState[list[int]]) -> None:
    """Who changes the tokens afterwards doesn't change the history; nothing keeps their memory from being resized."""
    for tokens in ([1, 2], array("i", [1, 2]), array("q", [1, 2])):
        state.rewind(0)
        state.append(tokens)
        tokens[0] = 5
        tokens.append(6)
        assert state.token_history == [1, 2]
        state.reuse_prefix(tokens)
        tokens[0] = 7
        tokens.pop()
        assert state.token_history == [5, 2, 6]


def test_the_history_itself(state: BorrowedState[list[int]]) -> None:
    """The history can be appended to itself, and be what it's compared with."""
    state.append(state.token_history)
    assert state.token_history == [7, 8, 7, 8]
    assert state.reuse_prefix(state.token_history) == 0
    assert state.token_history == [7, 8, 7, 8]


BAD: dict[str, tuple[Callable[[], Any], int]] = {
    "negative": (lambda: [1, 2, -1], 2),
    "only negative": (lambda: [-1], 0),
    "negative in a tuple": (lambda: (1, -1, 2), 1),
    "negative in a generator": (lambda: generate(1, -1), 1),
    "negative in an array": (lambda: array("i", [1, 2, 3, -5]), 3),
    "negative in an array q": (lambda: array("q", [-(2**40)]), 0),
    "negative in a view": (lambda: memoryview(array("i", [1, -5])), 1),
    "negative in a tensor": (lambda: Tensor([1, -5]), 1),
    "smallest C int": (lambda: [-(2**31)], 0),
    "too large": (lambda: [1, 2**31], 1),
    "too large in an array": (lambda: array("I", [1, 2**31]), 1),
    "huge": (lambda: [1, 2**100], 1),
    "foreign and negative": (lambda: [1, Index(-1)], 1),
    "float": (lambda: [1, 2.0], 1),
    "only a float": (lambda: [1.0], 0),
    "floats in an array": (lambda: array("d", [1, 2]), 0),
    "None": (lambda: [1, None, 2], 1),
    "str": (lambda: [1, "2"], 1),
    "a text": (lambda: "12", 0),
    "bytes within": (lambda: [b"1"], 0),
    "complex": (lambda: [1, 1j], 1),
    "lists": (lambda: [[1, 2], [3, 4]], 0),
    "two dimensions": (lambda: memoryview(array("i", range(6))).cast("B").cast("i", (2, 3)), 0),
    "a tensor of two dimensions": (lambda: Tensor([[1, 2], [3, 4]]), 0),
    "an index that fails": (lambda: [1, Failing()], 1),
    "only an index that fails": (lambda: [Failing()], 0),
    "an index that fails in a tuple": (lambda: (1, Failing()), 1),
    "an index that fails in an iterator": (lambda: iter([1, 2, Failing()]), 2),
    "bools in a tensor": (lambda: Tensor([True, False]), 0),
    "a bool in a tensor": (lambda: Tensor([1, True]), 1),
}
BAD_TOKENS = pytest.mark.parametrize(("make", "position"), BAD.values(), ids=BAD.keys())


@BAD_TOKENS
def test_append_refuses_what_is_no_token(
    state: BorrowedState[list[int]], make: Callable[[], Any], position: int
) -> None:
    """The error says which is wrong; all or nothing is added."""
    with pytest.raises(
        ValueError, match=rf"2\*\*31 - 1, but the one at position {position} is not"
    ):
        state.append(make())
    assert state.token_history == [7, 8]


@BAD_TOKENS
def test_reuse_prefix_refuses_what_is_no_token(
    state: BorrowedState[list[int]], make: Callable[[], Any], position: int
) -> None:
    """The error says which is wrong, also behind a common prefix; nothing changes."""
    state.rewind(0)
    state.append([1, 2, 3])
    with pytest.raises(
        ValueError, match=rf"2\*\*31 - 1, but the one at position {position} is not"
    ):
        state.reuse_prefix(make())
    assert state.token_history == [1, 2, 3]


BYTES: dict[str, Callable[[], Any]] = {
    "bytes": lambda: b"12",
    "no bytes": lambda: b"",
    "bytearray": lambda: bytearray(b"12"),
    "view of bytes": lambda: memoryview(b"12"),
    "view of a bytearray": lambda: memoryview(bytearray(b"12")),
    "part of a view": lambda: memoryview(b"1234")[::2],
    "signed view": lambda: memoryview(b"12").cast("b"),
    "view of 64 bits": lambda: memoryview(bytes(16)).cast("q"),
}
uses = pytest.mark.parametrize("use", [append, reuse_prefix])


@uses
@pytest.mark.parametrize("make", BYTES.values(), ids=BYTES.keys())
def test_bytes_are_no_tokens(
    state: BorrowedState[list[int]],
    use: Callable[[BorrowedState[list[int]], Any], None],
    make: Callable[[], Any],
) -> None:
    """A text that somebody forgot to tokenize isn't taken for tokens: its bytes would be ints from 0 to 255."""
    with pytest.raises(ValueError, match="token ids must be ints, not the bytes of a"):
        use(state, make())
    assert state.token_history == [7, 8]


@uses
@pytest.mark.parametrize("container", [list[Any], tuple[Any, ...], iter], ids=str)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=repr)
def test_an_index_that_is_interrupted(
    state: BorrowedState[list[int]],
    use: Callable[[BorrowedState[list[int]], Any], None],
    container: Callable[[list[Any]], Any],
    error: BaseException,
) -> None:
    """An interrupt, or a lack of memory, isn't taken for a wrong token: it goes on, and nothing is added."""

    class Interrupted:
        def __index__(self) -> int:
            raise error

    with pytest.raises(type(error)) as caught:
        use(state, container([1, 2, Interrupted()]))
    assert caught.value is error
    assert state.token_history == [7, 8]


@uses
@pytest.mark.parametrize("number", [0, 1, 20])
@pytest.mark.parametrize("values", [(9, -1), (-1, 9), (9, 2**31), (2**31, 9)], ids=repr)
def test_an_index_that_changes(
    state: BorrowedState[list[int]],
    use: Callable[[BorrowedState[list[int]], Any], None],
    values: tuple[int, int],
    number: int,
) -> None:
    """The very value that is looked at is the one that is added: one that changes in between never gets in unseen."""
    for container in (list[Any], tuple[Any, ...], iter):
        state.rewind(0)
        with suppress(ValueError):
            use(state, container([*[1] * number, Once(*values)]))
        assert state.token_history[:] in ([], [*[1] * number, 9])


@uses
def test_a_list_that_shrinks_meanwhile(
    state: BorrowedState[list[int]], use: Callable[[BorrowedState[list[int]], Any], None]
) -> None:
    """A list that loses tokens while it's read is refused, or taken as it was: nothing that was in no list gets in."""

    class Shrinks:
        def __index__(self) -> int:
            del tokens[1:]
            return 5

    tokens: list[Any] = [Shrinks(), *range(50)]
    with suppress(ValueError):
        use(state, tokens)
    assert state.token_history[:] in ([7, 8], [7, 8, 5], [5])


@uses
def test_a_list_that_grows_meanwhile(
    state: BorrowedState[list[int]], use: Callable[[BorrowedState[list[int]], Any], None]
) -> None:
    """What comes to a list while it's read is checked, too, or stays out."""

    class Grows:
        def __index__(self) -> int:
            tokens.extend([-1] * 100)
            return 5

    tokens: list[Any] = [1, Grows(), 2]
    with suppress(ValueError):
        use(state, tokens)
    assert state.token_history[:] in ([7, 8], [7, 8, 1, 5, 2], [1, 5, 2])


@uses
@pytest.mark.parametrize(
    "wrong",
    [None, 5, 1.5, object(), Index(1), Tensor(5), ctypes.c_int(5)],
    ids=["None", "int", "float", "object", "foreign int", "scalar tensor", "scalar buffer"],
)
def test_no_container(
    state: BorrowedState[list[int]],
    use: Callable[[BorrowedState[list[int]], Any], None],
    wrong: Any,
) -> None:
    """A single token, or nothing at all, is a clear error: it isn't guessed what was meant."""
    with pytest.raises(TypeError):
        use(state, wrong)
    assert state.token_history == [7, 8]


@uses
def test_generator_that_fails(
    state: BorrowedState[list[int]], use: Callable[[BorrowedState[list[int]], Any], None]
) -> None:
    """An iterable that fails half-way adds nothing, and its error is passed on."""
    error = KeyError("tokenizer")

    def failing() -> Iterator[int]:
        yield 1
        raise error

    with pytest.raises(KeyError) as caught:
        use(state, failing())
    assert caught.value is error
    assert state.token_history == [7, 8]


def test_generator_that_appends(state: BorrowedState[list[int]]) -> None:
    """An iterable that itself adds tokens while it's read adds them first."""

    def nested() -> Iterator[int]:
        state.append([1])
        yield 3
        state.append([2])
        yield 4

    state.append(nested())
    assert state.token_history == [7, 8, 1, 2, 3, 4]


def test_error_shows_no_token(state: BorrowedState[list[int]]) -> None:
    """What a user wrote doesn't get into the log by way of a wrong token."""
    for tokens in ([123456, -123456], (123456, "123456"), array("q", [123456, 2**40 + 123456])):
        with pytest.raises(ValueError, match="position 1") as caught:
            state.append(cast("list[int]", tokens))
        assert "123456" not in str(caught.value)
        assert caught.value.__cause__ is None
        if not caught.value.__suppress_context__:
            assert "123456" not in repr(caught.value.__context__)


# NumPy, where there is one


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "uint32", "uint64", ">i4"])
@pytest.mark.parametrize("step", [1, 2, -1])
def test_numpy(state: BorrowedState[list[int]], dtype: str, step: int) -> None:
    """NumPy's integers of any size, order and stride are taken."""
    np = pytest.importorskip("numpy")
    tokens = np.array([1, 0, 1, 1, 0], dtype)[::step]
    state.append(tokens)
    assert state.token_history == [7, 8, *tokens.tolist()]
    assert state.reuse_prefix(tokens) == 0
    state.append(list(tokens))
    assert state.token_history == tokens.tolist() * 2


BAD_NUMPY: dict[str, Callable[[Any], Any]] = {
    "2-D": lambda np: np.array([[1, 2], [3, 4]], "int32"),
    "float": lambda np: np.array([1.0, 2.0]),
    "negative": lambda np: np.array([1, -2], "int32"),
    "too large": lambda np: np.array([1, 2**40]),
    "str": lambda np: np.array(["1"]),
    "float item": lambda np: [np.float32(1)],
    "negative item": lambda np: [np.int64(-1)],
}


@pytest.mark.parametrize("make", BAD_NUMPY.values(), ids=BAD_NUMPY.keys())
def test_bad_numpy(state: BorrowedState[list[int]], make: Callable[[Any], Any]) -> None:
    """NumPy's other arrays are refused as any others."""
    np = pytest.importorskip("numpy")
    with pytest.raises(ValueError, match="token ids must be ints"):
        state.append(make(np))
    assert state.token_history == [7, 8]


def test_numpy_scalar(state: BorrowedState[list[int]]) -> None:
    """A scalar of NumPy's is no container."""
    np = pytest.importorskip("numpy")
    for scalar in (np.int32(5), np.array(5, "int32")):
        with pytest.raises(TypeError):
            state.append(scalar)


@uses
@pytest.mark.parametrize("values", [[True, False], [False], [True] * 100], ids=len)
def test_numpy_masks(
    state: BorrowedState[list[int]],
    use: Callable[[BorrowedState[list[int]], Any], None],
    values: list[bool],
) -> None:
    """An attention mask, which is easily mistaken for the tokens that it belongs to, isn't taken for ids 0 and 1."""
    np = pytest.importorskip("numpy")
    for tokens in (np.array(values), np.array(values)[::-1], memoryview(np.array(values))):
        with pytest.raises(ValueError, match="the one at position 0 is not"):
            use(state, tokens)
    assert state.token_history == [7, 8]


@uses
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
def test_numpy_masked_arrays(
    state: BorrowedState[list[int]],
    use: Callable[[BorrowedState[list[int]], Any], None],
    dtype: str,
) -> None:
    """What a masked array hides is no token: it isn't read from the memory beneath."""
    np = pytest.importorskip("numpy")
    for masked in range(3):
        mask = [position == masked for position in range(3)]
        tokens = np.ma.array([7, 8, 9], dtype, mask=mask)
        with pytest.raises(ValueError, match=f"the one at position {masked} is not"):
            use(state, tokens)
        assert state.token_history == [7, 8]


@uses
@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("mask", [False, [False] * 3], ids=["no mask", "nothing masked"])
def test_numpy_masked_arrays_that_hide_nothing(
    state: BorrowedState[list[int]],
    use: Callable[[BorrowedState[list[int]], Any], None],
    dtype: str,
    mask: Any,
) -> None:
    """A masked array that hides nothing is as good as any other."""
    np = pytest.importorskip("numpy")
    state.rewind(0)
    use(state, np.ma.array([1, 2, 3], dtype, mask=mask))
    assert state.token_history == [1, 2, 3]


@uses
def test_numpy_arrays_among_tokens(
    state: BorrowedState[list[int]], use: Callable[[BorrowedState[list[int]], Any], None]
) -> None:
    """An array of two ids isn't one of them, wherever it stands."""
    np = pytest.importorskip("numpy")
    two = np.array([1, 2])
    for tokens in ([two], [1, two], (two, 1), iter([two]), np.array([[1, 2]])):
        with pytest.raises(ValueError, match="token ids must be ints"):
            use(state, tokens)
    assert state.token_history == [7, 8]


# Against a plain model

TOKEN = st.integers(0, LARGEST)
NOT_TOKENS = st.one_of(
    st.integers(max_value=-1), st.integers(min_value=2**31), st.floats(), st.none(), st.text()
)
CONTAINERS: list[Callable[[list[Any]], Any]] = [
    list[Any],
    tuple[Any, ...],
    iter,
    deque[Any],
    Tensor,
]


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.lists(TOKEN, max_size=30),
    st.none() | st.tuples(NOT_TOKENS, st.integers(0, 30)),
    st.sampled_from(CONTAINERS),
)
def test_append_all_or_nothing(
    tokens: list[Any],
    bad: tuple[object, int] | None,
    container: Callable[[list[Any]], Any],
) -> None:
    """Whatever is among the tokens, at whatever position and in whatever container: all are added, or none."""
    with Session() as session, SLOTS.borrow(session) as state:
        state.append([1])
        if bad is None:
            state.append(container(tokens))
            assert state.token_history == [1, *tokens]
            return
        position = min(bad[1], len(tokens))
        tokens.insert(position, bad[0])
        with pytest.raises(ValueError, match=f"position {position} "):
            state.append(container(tokens))
        assert state.token_history == [1]


def common(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how long the common prefix is, one token at a time."""
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    return count


def reused(history: Sequence[int], tokens: Iterable[int]) -> tuple[int, list[int]]:
    """Return what is reused of a history that's cached as a whole, and what the history is then."""
    with Session() as session, SLOTS.borrow(session) as state:
        state.append(history)
        state.kv_cache.extend(history)
        state.advance(len(history))
        return state.reuse_prefix(tokens), list(state.token_history)


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.integers(0, 1), max_size=100),
    st.lists(st.integers(0, 1), max_size=100),
    st.integers(0, 100),
    st.booleans(),
)
def test_common_prefix(left: list[int], right: list[int], shared: int, as_array: bool) -> None:  # noqa: FBT001
    """The longest common prefix is found: not a token less, nor one more."""
    right = left[:shared] + right
    expected = max(min(common(left, right), len(right) - 1), 0)
    tokens = array("i", right) if as_array else right
    assert reused(left, tokens) == (expected, right)


def near(*positions: int) -> list[int]:
    """Return positions around those."""
    return sorted({near for it in positions for near in (it - 2, it - 1, it, it + 1, it + 2)})


# Sums of 16, 32, 64 and so on: where slices could begin and end that grow twofold up to 8192.
BOUNDS = [16 * (2**power - 1) for power in range(1, 10)]
LONG = 16 * (2**9 - 1) + 3 * 8192 + 5


@pytest.mark.parametrize(
    "position",
    [
        it
        for it in near(*BOUNDS, 8192, 2 * 8192, BOUNDS[-1] + 8192, BOUNDS[-1] + 2 * 8192, LONG - 3)
        if it < LONG
    ],
)
def test_mismatches_of_long_histories(position: int) -> None:
    """A difference is found also at the bounds of what is compared at once."""
    history = array("i", range(LONG))
    tokens = history[:]
    tokens[position] += 1
    assert reused(history, tokens)[0] == position
    for following in range(position + 1, min(position + 40, LONG)):
        tokens[following] += 1  # later differences don't matter
    assert reused(history, tokens)[0] == position


@pytest.mark.parametrize("length", near(*BOUNDS, 8192, BOUNDS[-1] + 8192))
def test_equal_long_histories(length: int) -> None:
    """Where nothing differs, all is reused but the one token to decode from."""
    history = array("i", range(length))
    assert reused(history, history)[0] == length - 1
    assert reused(history, array("i", range(length + 7)))[0] == length
    assert reused(array("i", range(length + 7)), history)[0] == length - 1
