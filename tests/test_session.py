"""A session: who it is, that it never changes, what it tells, and how it ends."""

# ruff: noqa: PT012 what's tested is how a block fails

import gc
import importlib
import pickle
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any, cast, get_type_hints
from uuid import UUID, uuid4

import pytest
from tests.caches import Cache, Fault, Memory

from inference_session import Session, engine, exceptions
from inference_session.engine import DecodeResult, PrefillResult, StateSlots
from inference_session.exceptions import SessionClosedError, SessionError


SOME_ID = UUID("12345678-1234-5678-1234-567812345678")


# Who it is


@pytest.mark.parametrize("new", [Session, Session.new], ids=["Session()", "Session.new()"])
def test_ids_are_random(new: Callable[[], Session]) -> None:
    """Nobody can guess an id, and no two sessions share one: they are UUIDs of version 4."""
    ids = {new().id for _ in range(100)}
    assert len(ids) == 100
    assert {each.version for each in ids} == {4}


def test_with_id() -> None:
    """A test or a replay gets exactly the id it asks for, of whatever version."""
    assert Session.with_id(SOME_ID).id is SOME_ID


@pytest.mark.parametrize(
    "wrong",
    [str(SOME_ID), SOME_ID.bytes, 1, None, Session()],
    ids=lambda wrong: type(wrong).__name__,
)
def test_with_id_takes_uuids_only(wrong: object) -> None:
    """An id of another type is refused at once, and the error says what it got."""
    with pytest.raises(TypeError, match=rf"UUID, got '{type(wrong).__name__}'"):
        Session.with_id(cast("UUID", wrong))


def test_id_can_not_be_set() -> None:
    """What a registry knows a session by never changes."""
    session = Session.with_id(SOME_ID)
    with pytest.raises(AttributeError):
        setattr(session, "id", uuid4())  # noqa: B010 a type checker would tell
    assert session.id == SOME_ID


def test_id_can_not_be_deleted() -> None:
    """A session is never without its id."""
    session = Session.with_id(SOME_ID)
    with pytest.raises(AttributeError):
        delattr(session, "id")
    assert session.id == SOME_ID


def test_initialised_once(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A second `__init__` doesn't silently make another session of it."""
    with slots.borrow(session) as state:
        memory.step(state, 1, 2)
    before = session.id
    with pytest.raises(TypeError, match="only once"):
        session.__init__()
    assert (session.id, session.token_count) == (before, 2)


def test_no_arguments() -> None:
    """An id goes to `with_id`; the constructor doesn't guess."""
    make = cast("Callable[..., Session]", Session)
    with pytest.raises(TypeError, match="with_id"):
        make(SOME_ID)
    with pytest.raises(TypeError, match="with_id"):
        make(id=SOME_ID)


def test_nothing_can_be_added(session: Session) -> None:
    """A misspelt attribute is an error, and a session stays small."""
    with pytest.raises(AttributeError):
        setattr(session, "token_counts", 1)  # noqa: B010 a type checker would tell
    assert not hasattr(session, "__dict__")


def test_equals_itself_only() -> None:
    """Two sessions are never equal, not even with the same id: they hold different caches."""
    one, other = Session.with_id(SOME_ID), Session.with_id(SOME_ID)
    assert one == one  # noqa: PLR0124 that's the question
    assert one != other
    assert len({one, other, one}) == 2
    assert {one: 1}[one] == 1


def test_hash_never_changes(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A session is found in a dict, whatever happened to it since."""
    found = {session: "here"}
    with slots.borrow(session) as state:
        memory.step(state, 1)
    session.close()
    assert found[session] == "here"


def test_weak_references() -> None:
    """A cache of sessions may let them go."""
    session = Session()
    reference = weakref.ref(session)
    assert reference() is session
    del session
    assert reference() is None


# What it shows


def test_repr_of_an_idle_session() -> None:
    """A log tells sessions apart."""
    assert repr(Session.with_id(SOME_ID)) == f"<Session {SOME_ID} idle, 0 tokens>"


def test_repr_of_a_borrowed_session(slots: StateSlots[Cache], memory: Memory) -> None:
    """A log tells that a step is under way, and how many tokens are committed: not those that aren't."""
    with Session.with_id(SOME_ID) as session:
        with slots.borrow(session) as state:
            memory.step(state, 1, 2, 3)
            assert repr(session) == f"<Session {SOME_ID} borrowed, 0 tokens>"
            state.commit()
            assert repr(session) == f"<Session {SOME_ID} borrowed, 3 tokens>"
        assert repr(session) == f"<Session {SOME_ID} idle, 3 tokens>"


def test_repr_of_a_closed_session(slots: StateSlots[Cache], memory: Memory) -> None:
    """A log tells that a session is closed, from the very moment on."""
    session = Session.with_id(SOME_ID)
    with slots.borrow(session) as state:
        memory.step(state, 1)
        state.commit()
        session.close()
        assert repr(session) == f"<Session {SOME_ID} closed, 1 tokens>"
    assert repr(session) == f"<Session {SOME_ID} closed, 0 tokens>"


def test_token_count(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """It counts committed tokens only, fed or not; one that watches a step never sees it go back."""
    assert session.token_count == 0
    with slots.borrow(session) as state:
        memory.step(state, 1, 2)
        assert session.token_count == 0
        state.commit()
        assert session.token_count == 2
        state.append([3])
        assert session.token_count == 2
        state.rewind(1)
        assert session.token_count == 2
    assert session.token_count == 1
    with pytest.raises(MemoryError), slots.borrow(session) as state:
        state.append([4])
        raise MemoryError
    assert session.token_count == 1


def test_borrowed(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A health page tells which sessions have a step under way: from its very beginning to its very end."""
    before = session.borrowed
    with slots.borrow(session) as state:
        begun = session.borrowed
        memory.step(state, 1)
        state.commit()
        committed = session.borrowed
    ended = session.borrowed
    assert (before, begun, committed, ended) == (False, True, True, False)


def test_borrowed_in_a_batch(session: Session, slots: StateSlots[Cache]) -> None:
    """All of a batch are borrowed, and none of one that was refused."""
    with Session() as other:
        with slots.borrow_all([session, other]):
            assert [session.borrowed, other.borrowed] == [True, True]
        assert [session.borrowed, other.borrowed] == [False, False]
        with slots.borrow(other):
            with pytest.raises(SessionError), slots.borrow_all([session, other]):
                pass
            assert [session.borrowed, other.borrowed] == [False, True]


def test_borrowed_when_closed(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A session closed in mid-borrow is borrowed until that ends: its memory isn't back yet."""
    with slots.borrow(session) as state:
        memory.step(state, 1)
        session.close()
        closed = session.borrowed
    ended = session.borrowed
    with pytest.raises(SessionClosedError), slots.borrow(session):
        pass
    assert (closed, ended, session.borrowed) == (True, False, False)


def test_borrowed_after_a_failure(session: Session, slots: StateSlots[Cache]) -> None:
    """A step that failed isn't under way any more, be it in the block, at its end, or before it began."""
    with pytest.raises(MemoryError), slots.borrow(session):
        raise MemoryError
    assert not session.borrowed
    with pytest.raises(SessionError), slots.borrow(session) as state:
        state.kv_cache.tokens.append(1)
    assert not session.borrowed
    other = StateSlots[list[int]](create=list, length=len)
    with slots.borrow(session) as state:
        state.append([1])
    with pytest.raises(SessionError), other.borrow(session):
        pass
    assert not session.borrowed


@pytest.mark.parametrize("batch", [False, True], ids=["borrow", "borrow_all"])
def test_borrowed_when_abandoned(
    session: Session, slots: StateSlots[Cache], *, batch: bool
) -> None:
    """A borrow that was dropped unfinished is over, though its end never came."""
    borrow = slots.borrow_all([session]) if batch else slots.borrow(session)
    entered: object = borrow.__enter__()
    begun = session.borrowed
    del borrow, entered
    gc.collect()
    assert (begun, session.borrowed) == (True, False)
    assert " idle, " in repr(session)


def test_borrowed_while_the_library_has_it(slots: StateSlots[Cache], memory: Memory) -> None:
    """A session that is being closed is at nobody's disposal, but no step is under way."""
    seen: list[bool] = []

    def release(cache: Cache) -> None:
        seen.append(session.borrowed)
        memory.release(cache)

    noting = StateSlots(create=memory.create, length=memory.length, release=release)
    session = Session()
    with noting.borrow(session) as state:
        memory.step(state, 1)
    session.close()
    assert seen == [False]


@pytest.mark.parametrize("name", ["token_count", "borrowed", "closed"])
def test_properties_are_read_only(session: Session, name: str) -> None:
    """Nobody reopens a session, or miscounts its tokens, by assignment."""
    with pytest.raises(AttributeError):
        setattr(session, name, 0)


# How it ends


def test_close(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """Closing frees the state at once, through `release`, and says so."""
    with slots.borrow(session) as state:
        memory.step(state, 1, 2)
    before = session.closed
    session.close()
    assert (before, session.closed) == (False, True)
    assert session.token_count == 0
    assert [cache.released for cache in memory.caches] == [1]


def test_close_is_idempotent(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """A second `close` does nothing, whoever comes with it."""
    with slots.borrow(session) as state:
        memory.step(state, 1)
    session.close()
    session.close()
    assert [cache.released for cache in memory.caches] == [1]


def test_close_without_state() -> None:
    """A session that no engine has ever seen can be closed."""
    session = Session()
    session.close()
    assert session.closed


def test_context_manager(slots: StateSlots[Cache], memory: Memory) -> None:
    """A session is closed at the end of its block, and the block gets the session itself."""
    session = Session()
    with session as entered:
        assert entered is session
        with slots.borrow(session) as state:
            memory.step(state, 1)
    assert session.closed
    assert not memory.live()


def test_context_manager_that_fails(slots: StateSlots[Cache], memory: Memory) -> None:
    """A session is closed when its block fails, too, and the exception goes on."""
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt) as caught, Session() as session:
        with slots.borrow(session) as state:
            memory.step(state, 1)
        raise error
    assert caught.value is error
    assert session.closed
    assert not memory.live()


def test_close_in_mid_borrow(session: Session, slots: StateSlots[Cache], memory: Memory) -> None:
    """Closing is how a server cancels: the borrow goes on in peace, and the state is freed when it ends."""
    with slots.borrow(session) as state:
        memory.step(state, 1, 2)
        session.close()
        assert session.closed
        assert len(memory.live()) == 1
        memory.step(state, 3)
        assert list(state.token_history) == [1, 2, 3]
        with pytest.raises(SessionClosedError), slots.borrow(session):
            pytest.fail("borrowed a closed session")
    assert not memory.live()
    assert session.token_count == 0


def test_close_in_a_borrow_that_fails(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """The state of a session closed in mid-borrow is freed when that is rolled back, too."""
    with slots.borrow(session) as state:
        memory.step(state, 1, 2)
    with pytest.raises(MemoryError), slots.borrow(session) as state:
        memory.step(state, 3)
        session.close()
        raise MemoryError
    assert not memory.live()


@pytest.mark.parametrize("error", [ConnectionError("gone"), KeyboardInterrupt()], ids=repr)
def test_close_when_release_fails(
    session: Session, slots: StateSlots[Cache], memory: Memory, error: BaseException
) -> None:
    """What `release` raises goes to the caller; the session is closed and empty all the same, and it's called once."""
    with slots.borrow(session) as state:
        memory.step(state, 1, 2)
    memory.fail(Fault("release", error))
    with pytest.raises(type(error)) as caught:
        session.close()
    assert caught.value is error
    assert session.closed
    assert session.token_count == 0
    session.close()
    assert [cache.released for cache in memory.caches] == [1]


def test_close_in_mid_borrow_when_release_fails(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """What `release` raises goes to the borrower then, if nothing else does."""
    error = ConnectionError()
    with pytest.raises(ConnectionError) as caught, slots.borrow(session) as state:
        memory.step(state, 1, 2)
        session.close()
        memory.fail(Fault("release", error))
    assert caught.value is error
    assert session.token_count == 0


def test_close_in_a_borrow_that_fails_when_release_fails(
    session: Session, slots: StateSlots[Cache], memory: Memory
) -> None:
    """What `release` raises doesn't hide what went wrong before: it becomes a note on it."""
    with slots.borrow(session) as state:
        memory.step(state, 1, 2)
    error = MemoryError()
    with pytest.raises(MemoryError) as caught, slots.borrow(session):
        session.close()
        memory.fail(Fault("release", ConnectionError()))
        raise error
    assert caught.value is error
    (note,) = error.__notes__
    assert "release" in note
    assert "ConnectionError" in note
    assert str(session.id) in note


def test_release_may_close_the_session(session: Session) -> None:
    """An engine whose `release` comes back to the session doesn't free it twice, nor wait for ever."""
    released: list[list[int]] = []

    def release(cache: list[int]) -> None:
        released.append(cache)
        session.close()

    slots = StateSlots[list[int]](create=list, length=len, release=release)
    with slots.borrow(session) as state:
        cache = state.kv_cache
    slots.evict(session)
    assert session.closed
    session.close()
    assert released == [cache]


@pytest.mark.parametrize("batch", [False, True], ids=["borrow", "borrow_all"])
def test_close_in_a_borrow_that_becomes_garbage(
    session: Session, slots: StateSlots[Cache], memory: Memory, *, batch: bool
) -> None:
    """The state of a session closed in mid-borrow is freed once the garbage collector finds that borrow."""
    borrow = slots.borrow_all([session]) if batch else slots.borrow(session)
    entered = borrow.__enter__()
    state = entered[0] if isinstance(entered, list) else entered
    memory.step(state, 1, 2)
    cycle: list[object] = [borrow, entered, state]
    cycle.append(cycle)
    session.close()
    assert memory.live()
    del borrow, entered, state, cycle
    gc.collect()
    assert not memory.live()
    assert (session.borrowed, session.token_count) == (False, 0)


@pytest.mark.parametrize("release", [True, False], ids=["release", "no release"])
def test_drop_without_close(*, release: bool) -> None:
    """A leak is reported where there's something to give back, and given back."""
    released: list[list[int]] = []
    slots = StateSlots[list[int]](
        create=list, length=len, release=released.append if release else None
    )
    session = Session()
    with slots.borrow(session) as state:
        cache = state.kv_cache
    text = repr(session)
    if release:
        with pytest.warns(ResourceWarning) as caught:
            del session, state
        assert [str(warning.message) for warning in caught] == [f"unclosed {text}"]
        assert released == [cache]
    else:
        del session, state  # a warning would be an error
        assert not released


def test_drop_warns_where_it_happens(slots: StateSlots[Cache], memory: Memory) -> None:
    """The warning points to the line that lost the session."""
    session = Session()
    with slots.borrow(session) as state:
        memory.step(state, 1)
    with pytest.warns(ResourceWarning, match="unclosed") as caught:
        del session, state
    assert caught[0].filename == __file__


def test_drop_of_what_holds_no_cache(slots: StateSlots[Cache], memory: Memory) -> None:
    """Nothing is reported where nothing is lost: new, closed and evicted sessions may be dropped."""
    new, closed, evicted = Session(), Session(), Session()
    with slots.borrow_all([closed, evicted]) as states:
        for state in states:
            memory.step(state, 1)
    closed.close()
    slots.evict(evicted)
    states.clear()
    del new, closed, evicted  # a warning would be an error
    assert not memory.live()


def test_drop_with_a_borrow_that_never_ended(slots: StateSlots[Cache], memory: Memory) -> None:
    """Both the cache in use and the one that a rollback would go back to are released."""
    session = Session()
    with slots.borrow(session) as state:
        memory.step(state, 1, 2)
    borrow = slots.borrow(session)
    state = borrow.__enter__()
    state.kv_cache = memory.new([1, 2])
    assert len(memory.live()) == 2
    with pytest.warns(ResourceWarning, match="unclosed"):
        del session, borrow, state
    assert not memory.live()


def test_drop_when_a_warning_is_an_error(
    slots: StateSlots[Cache], memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is released also where the warning is turned into an error."""
    unraisable: list[type[BaseException]] = []

    def hook(report: "sys.UnraisableHookArgs") -> None:
        unraisable.append(report.exc_type)

    monkeypatch.setattr(sys, "unraisablehook", hook)
    session = Session()
    with slots.borrow(session) as state:
        memory.step(state, 1)
    del session, state
    assert unraisable == [ResourceWarning]
    assert not memory.live()


def test_drop_with_a_warning_that_keeps_it(slots: StateSlots[Cache], memory: Memory) -> None:
    """A session that is reported as unclosed, and lives on in that report, is a closed one in good order."""
    session = Session.with_id(SOME_ID)
    with slots.borrow(session) as state:
        memory.step(state, 1, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del session, state
        gc.collect()
        (warning,) = caught
        kept = warning.source
        assert isinstance(kept, Session)
        assert [cache.released for cache in memory.caches] == [1]
        assert (kept.id, kept.closed, kept.borrowed, kept.token_count) == (SOME_ID, True, False, 0)
        assert repr(kept) == f"<Session {SOME_ID} closed, 0 tokens>"
        with pytest.raises(SessionClosedError), slots.borrow(kept):
            pass
        kept.close()
        del kept, warning
        caught.clear()
        gc.collect()
        assert caught == []
    assert [cache.released for cache in memory.caches] == [1]


def test_drop_of_a_session_closed_in_a_borrow_that_never_ended(
    slots: StateSlots[Cache], memory: Memory
) -> None:
    """A closed session doesn't leak what an unfinished borrow left, and it isn't reported: it was closed."""
    session = Session()
    borrow = slots.borrow(session)
    memory.step(borrow.__enter__(), 1)
    session.close()
    assert memory.live()
    del session, borrow
    assert not memory.live()


def test_no_reference_cycles(slots: StateSlots[Cache], memory: Memory) -> None:
    """Gigabytes of KV cache are freed when the last reference goes, not when the garbage is collected."""
    gc.disable()
    try:
        session = Session()
        with slots.borrow(session) as state:
            memory.step(state, 1, 2)
            state.commit()
            history = state.token_history
            assert list(history) == [1, 2]
        with slots.borrow_all([session]) as states:
            memory.step(states[0], 3)
        reference = weakref.ref(session)
        with pytest.warns(ResourceWarning, match="unclosed"):
            del session, state, states, history
        assert reference() is None
    finally:
        gc.enable()


# Half-built


USES: dict[str, Callable[[Session, StateSlots[Cache]], object]] = {
    "id": lambda it, slots: it.id,
    "token_count": lambda it, slots: it.token_count,
    "closed": lambda it, slots: it.closed,
    "borrowed": lambda it, slots: it.borrowed,
    "close": lambda it, slots: it.close(),
    "repr": lambda it, slots: repr(it),
    "borrow": lambda it, slots: slots.borrow(it).__enter__(),
    "borrow_all": lambda it, slots: slots.borrow_all([it]).__enter__(),
    "evict": lambda it, slots: slots.evict(it),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_half_built(
    use: Callable[[Session, StateSlots[Cache]], object], slots: StateSlots[Cache]
) -> None:
    """A session that was made without `__init__` can't be used, and can be dropped."""
    session = Session.__new__(Session)
    with pytest.raises(AttributeError):
        use(session, slots)
    del session  # an unraisable error would be one


def test_half_built_by_accident(monkeypatch: pytest.MonkeyPatch) -> None:
    """The finalizer of a session that was never initialised says nothing: not even where warnings are errors."""
    said: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    with pytest.raises(TypeError):
        cast("Any", Session)(1)
    with pytest.raises(TypeError):
        Session.with_id(cast("UUID", "1"))
    del_by_hand = Session.__new__(Session)
    del_by_hand.__del__()
    del del_by_hand
    gc.collect()
    assert said == []


# Where it is found

PUBLIC = [
    (importlib.import_module(module), name)
    for module in ("inference_session", "inference_session.engine", "inference_session.exceptions")
    for name in importlib.import_module(module).__all__
    if name != "TORN"  # which is a number
]
public_classes = pytest.mark.parametrize(
    ("module", "name"), PUBLIC, ids=[name for _, name in PUBLIC]
)


@public_classes
def test_modules(module: Any, name: str) -> None:
    """Pickles, tracebacks and `help` name the module that a class is to be imported from."""
    cls = getattr(module, name)
    assert cls.__module__ == module.__name__
    assert cls.__qualname__ == name
    assert repr(cls) == f"<class '{module.__name__}.{name}'>"


@public_classes
def test_type_hints(module: Any, name: str) -> None:
    """Libraries that read annotations at run time can: those of each class, and of each of its members."""
    cls: type = getattr(module, name)
    assert all(get_type_hints(cls).values())
    members: list[Any] = list(vars(cls).values())
    for member in members:
        function = getattr(member, "fget", getattr(member, "__func__", member))
        if getattr(function, "__annotations__", None):
            get_type_hints(function)


ERRORS = [
    getattr(exceptions, name)
    for name in exceptions.__all__
    if name not in {"SessionError", "SessionFileError", "StateMismatchError", "RegistryFullError"}
]
RESULTS: list[object] = [
    PrefillResult(3),
    DecodeResult(7),
    SessionError("why"),
    exceptions.StateMismatchError(SOME_ID, 1, 2),
    exceptions.RegistryFullError(2),
    exceptions.SessionFileError("a.session", "it isn't the file of a session"),
    *(error(SOME_ID) for error in ERRORS),
]


@pytest.mark.parametrize("result", RESULTS, ids=lambda it: type(it).__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_name_public_modules(result: object, protocol: int) -> None:
    """What is sent to another process, or kept, can be read by a later version, whose private modules may differ."""
    data = pickle.dumps(result, protocol)
    module = engine if isinstance(result, (PrefillResult, DecodeResult)) else exceptions
    assert module.__name__.encode() in data
    assert b"inference_session._" not in data
    assert repr(pickle.loads(data)) == repr(result)


def test_nothing_to_settle() -> None:
    """A session that is open and in no registry is left alone when a borrow of it has ended."""
    with Session() as session:
        session._settle()
        assert not session.closed


def test_given_back_just_when_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session whose borrow ends in the instant in which another thread closes it is freed, once."""
    released: list[list[int]] = []
    slots = StateSlots(create=list[int], length=len, release=released.append)
    session = Session()
    block = slots.borrow(session)
    assert block.__enter__().kv_cache == []
    settle_at_the_end = Session._settle_at_the_end

    def too_late(session: Session) -> bool:
        monkeypatch.undo()
        block.__exit__(None, None, None)
        return settle_at_the_end(session)

    monkeypatch.setattr(Session, "_settle_at_the_end", too_late)
    session.close()
    assert released == [[]]
    assert not session.borrowed
