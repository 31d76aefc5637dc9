"""How type checkers infer the type of a KV cache, without an annotation, from the functions that describe it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Self, assert_type

from attrs import define, field, frozen

from inference_session import Session
from inference_session.engine import BorrowedState, StateSlots


@define
class Cache:
    """A KV cache that changes in place, as most do."""

    rows: list[int] = field(factory=list[int])

    def __len__(self) -> int:
        return len(self.rows)

    def truncate(self, length: int) -> Self:
        """Return this very cache."""
        del self.rows[length:]
        return self

    def free(self) -> None:
        """Return nothing."""
        self.rows.clear()


def dump_cache(cache: Cache, file: BinaryIO) -> None:
    """Write a cache."""
    file.write(bytes(cache.rows))


def load_cache(file: BinaryIO) -> Cache:
    """Read a cache."""
    return Cache([*file.read()])


@frozen
class FrozenCache:
    """A KV cache that a step replaces, as in JAX."""

    rows: tuple[int, ...] = ()


def make_cache() -> Cache:
    """Return what a class returns."""
    return Cache()


def cache_length(cache: Cache) -> int:
    """Return an int, as `nbytes` would."""
    return len(cache.rows)


def cut_cache(cache: Cache, length: int) -> Cache:
    """Return another cache."""
    return Cache(cache.rows[:length])


def frozen_length(cache: FrozenCache) -> int:
    """Take the other type of cache."""
    return len(cache.rows)


def cut_frozen(cache: FrozenCache, length: int) -> FrozenCache:
    """Take and return the other type of cache."""
    return FrozenCache(cache.rows[:length])


def test_class() -> None:
    """A class and its methods, one that returns `Self` among them, tell the type."""
    slots = StateSlots(create=Cache, length=len, truncate=Cache.truncate, release=Cache.free)
    assert_type(slots, StateSlots[Cache])


def test_functions() -> None:
    """Functions tell the type."""
    slots = StateSlots(
        create=make_cache,
        length=cache_length,
        truncate=cut_cache,
        share=cut_cache,
        dump=dump_cache,
        load=load_cache,
        release=print,
        nbytes=cache_length,
    )
    assert_type(slots, StateSlots[Cache])


def test_bound_methods() -> None:
    """The methods of an engine tell the type, where the slots are an attribute of it."""

    class LayeredEngine:
        def __init__(self) -> None:
            self.slots = StateSlots(create=self.make, length=self.length, truncate=self.cut)

        def make(self) -> list[Cache]:
            return [Cache(), Cache()]

        def length(self, layers: list[Cache]) -> int:
            return min(map(len, layers))

        def cut(self, layers: list[Cache], length: int) -> list[Cache]:
            return [layer.truncate(length) for layer in layers]

    assert_type(LayeredEngine().slots, StateSlots[list[Cache]])


def test_lambdas() -> None:
    """Lambdas take the type from `create`."""
    slots = StateSlots(
        create=lambda: Cache([]),
        length=lambda cache: len(cache.rows),
        release=lambda cache: cache.rows.clear(),
        nbytes=lambda cache: 8 * len(cache.rows),
    )
    assert_type(slots, StateSlots[Cache])


def test_lambda_that_truncates() -> None:
    """A lambda that returns a cache should be told its type, or mypy makes it `Any`."""
    slots = StateSlots[Cache](
        create=make_cache, length=len, truncate=lambda cache, length: cache.truncate(length)
    )
    assert_type(slots, StateSlots[Cache])


def test_functional_cache() -> None:
    """An immutable cache is as good as one that changes in place."""
    slots = StateSlots(create=FrozenCache, length=frozen_length, truncate=cut_frozen)
    assert_type(slots, StateSlots[FrozenCache])


def test_builtins() -> None:
    """A container says by its class what it contains, or takes it from the slots."""
    assert_type(StateSlots(create=list[int], length=len), StateSlots[list[int]])
    assert_type(StateSlots[list[int]](create=list, length=len), StateSlots[list[int]])
    slots: StateSlots[list[int]] = StateSlots(create=list, length=len)
    assert_type(slots, StateSlots[list[int]])


def test_optional_functions_can_be_none() -> None:
    """What isn't needed may be None, for engines that choose at run time."""
    slots = StateSlots(create=make_cache, length=len, truncate=None, release=None, nbytes=None)
    assert_type(slots, StateSlots[Cache])


def test_borrow(slots: StateSlots[Cache], session: Session) -> None:
    """A borrow's state knows the type of the KV cache."""
    borrow = slots.borrow(session)
    assert_type(borrow, AbstractContextManager[BorrowedState[Cache], None])
    with borrow as state:
        assert_type(state, BorrowedState[Cache])
        assert_type(state.kv_cache, Cache)


def test_borrow_all(slots: StateSlots[Cache], sessions: set[Session]) -> None:
    """So do the states of a batch, which may come from any iterable."""
    with slots.borrow_all(sessions) as states:
        assert_type(states, list[BorrowedState[Cache]])
    with slots.borrow_all(session for session in sessions if session.closed) as states:
        assert_type(states, list[BorrowedState[Cache]])


def test_borrow_passes_exceptions_on(slots: StateSlots[Cache], session: Session) -> int:
    """A block that returns needs no return after it, as `with` never swallows an exception."""
    with slots.borrow(session) as state:
        return state.kv_length


def test_borrow_all_passes_exceptions_on(slots: StateSlots[Cache], session: Session) -> int:
    """The same holds for a batch."""
    with slots.borrow_all([session]) as states:
        return len(states)


def test_evict(slots: StateSlots[Cache], session: Session) -> None:
    """Evicting is a statement."""
    evict: Callable[[Session], None] = slots.evict
    evict(session)


def test_save_and_restore(slots: StateSlots[Cache], session: Session, path: Path) -> None:
    """A path is text or a `Path`; a session comes back."""
    save: Callable[[Session, str], None] = slots.save
    save(session, "file")
    slots.save(session, path, move=True)
    assert_type(slots.restore(path), Session)
    assert_type(slots.restore("file", take=True), Session)


def test_files_are_paths_and_options_are_named(slots: StateSlots[Cache], session: Session) -> None:
    """An open file can't be replaced as a whole, and a bare `True` says nothing."""
    with Path("file").open("wb") as file:
        slots.save(session, file)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    slots.save(session, "file", True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[too-many-positional-arguments]  # noqa: FBT003
    slots.restore("file", True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[too-many-positional-arguments]  # noqa: FBT003
    slots.save("file", session)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]


def test_wrong_create() -> None:
    """A `create` that wants arguments, or isn't a function, is refused."""
    StateSlots(create=cache_length, length=int)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    StateSlots(create=Cache(), length=len)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]


def test_wrong_length() -> None:
    """A `length` of something else, or that isn't an int, is refused."""
    StateSlots(create=make_cache, length=frozen_length)  # type: ignore[misc]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    StateSlots(create=FrozenCache, length=len)  # type: ignore[misc]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    StateSlots(create=make_cache, length=str)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    StateSlots(create=make_cache, length=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]


def test_wrong_truncate() -> None:
    """A `truncate` of something else, or that doesn't return a cache, is refused."""
    StateSlots(create=make_cache, length=len, truncate=cut_frozen)  # type: ignore[misc]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    StateSlots(create=make_cache, length=len, truncate=Cache.free)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]


def test_wrong_share() -> None:
    """A `share` of something else is refused."""
    StateSlots(create=make_cache, length=len, share=cut_frozen)  # type: ignore[misc]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]


def test_wrong_dump_and_load() -> None:
    """A `load` of something else, or both of text files, are refused."""
    StateSlots(create=FrozenCache, length=frozen_length, dump=print, load=load_cache)  # type: ignore[misc]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    StateSlots(create=make_cache, length=len, dump=load_cache, load=load_cache)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]


def test_wrong_release() -> None:
    """A `release` of something else is refused."""
    StateSlots(create=make_cache, length=len, release=frozen_length)  # type: ignore[misc]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]


def test_wrong_nbytes() -> None:
    """An `nbytes` of something else, or that isn't an int, is refused."""
    StateSlots(create=make_cache, length=len, nbytes=frozen_length)  # type: ignore[misc]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    StateSlots(create=make_cache, length=len, nbytes=str)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]


def test_arguments_are_by_keyword() -> None:
    """Functions are given by name, those needed among them, and no others."""
    StateSlots(make_cache, cache_length)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[missing-argument, too-many-positional-arguments]
    StateSlots(create=make_cache)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[missing-argument]
    StateSlots(length=cache_length)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[missing-argument]
    StateSlots(create=make_cache, length=len, copy=make_cache)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[unknown-argument]


def test_functions_cannot_be_set(slots: StateSlots[Cache]) -> None:
    """Slots don't change once they are made."""
    slots.create = make_cache  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]
    slots.length = cache_length  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]
    slots.truncate = None  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]
    slots.release = None  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]
    slots.nbytes = None  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # ty: ignore[invalid-assignment]


def test_slots_are_for_one_type(slots: StateSlots[Cache]) -> None:
    """Slots for one type of cache aren't slots for another, a more general one included."""
    other: StateSlots[FrozenCache] = slots  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]  # ty: ignore[invalid-assignment]
    general: StateSlots[object] = slots  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]  # ty: ignore[invalid-assignment]
    assert other is not general


def test_only_sessions_are_borrowed(slots: StateSlots[Cache], session: Session) -> None:
    """What is borrowed are sessions, not their ids; one by `borrow`, several by `borrow_all`."""
    slots.borrow(session.id)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    slots.borrow([session])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    slots.borrow_all(session)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    slots.borrow_all([session.id])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    slots.evict(session.id)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]


def test_keys_are_strings_by_keyword(slots: StateSlots[Cache], session: Session) -> None:
    """A key is a `str`, and named."""
    assert_type(
        slots.borrow(session, key="adapter"), AbstractContextManager[BorrowedState[Cache], None]
    )
    slots.borrow_all([session], key="adapter")
    slots.borrow(session, "adapter")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # ty: ignore[too-many-positional-arguments]
    slots.borrow(session, key=7)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]
    slots.borrow_all([session], key=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # ty: ignore[invalid-argument-type]


def test_state_is_had_by_with(slots: StateSlots[Cache], session: Session) -> None:
    """What `borrow` returns isn't the state yet."""
    slots.borrow(session).commit()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]  # ty: ignore[missing-attribute]
    slots.borrow_all([session]).pop()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]  # ty: ignore[missing-attribute]


def test_slots_cannot_be_subclassed() -> None:
    """`StateSlots` is final."""

    class Slots(StateSlots[Cache]):  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues, reportUnusedClass]  # ty: ignore[subclass-of-final-class]
        pass
