"""The checks: one promise each, and a test by which Hypothesis tries to break it.

The first line of a check's docstring is its promise, and is shown when it's broken.
"""

import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Final, TypeAlias
from uuid import UUID

from attrs import frozen

from inference_session import Session
from inference_session.exceptions import SessionBusyError, SessionClosedError, SessionOwnerError
from inference_session.testing._choices import text
from inference_session.testing._faults import (
    ERRORS,
    Close,
    Fault,
    Pause,
    close_within,
    fail_batch,
    fail_rewind,
    fail_step,
    fail_step_twice,
    race,
    step_together,
)
from inference_session.testing._observer import Event, part_name, slots_of
from inference_session.testing._scenario import (
    DECODE,
    MOST_SESSIONS,
    Chat,
    Scenario,
    Step,
    prefill,
    told,
)


Function: TypeAlias = Callable[[Scenario], None]


@frozen
class Check:
    """A promise, and its test."""

    name: str
    promise: str
    run: Function
    vacuous: str = ""
    """The reason for skipping the check if its subject never happens."""
    simple: bool = False
    """Whether there is so little to choose that a quarter of the examples is enough."""


CHECKS: Final[dict[str, Check]] = {}
"""All checks by name, the most basic first."""


def check(function: Function) -> Function:
    """Make a function a check."""
    return about()(function)


def about(vacuous: str = "", *, simple: bool = False) -> Callable[[Function], Function]:
    """Make a function a check: one whose subject must happen at least once, or a simple one."""

    def register(function: Function) -> Function:
        name, promise = function.__name__, (function.__doc__ or "").partition("\n")[0]
        CHECKS[name] = Check(name, promise, function, vacuous, simple)
        return function

    return register


# Input and output


@check
def engine_runs(run: Scenario) -> None:
    """A new engine prefills a prompt and decodes from it, without an error."""
    run.held = None  # other checks ask for it
    chat = run.open()
    run.note(f"engine.prefill({chat}, [1, 0, 1])", chat)
    run.attempt(run.call(chat, prefill([1, 0, 1])))
    for _ in range(2):
        run.note(f"engine.decode({chat})")
        run.token(run.attempt(run.call(chat, DECODE)))


@about(simple=True)
def tokens_reach_the_session(run: Scenario) -> None:
    """Prefill adds its tokens to the session, in order, and decode adds the token that it returns."""
    chat = run.open()
    for _ in range(run.choose.number(1, 3)):
        tokens = run.choose.tokens(1, 7)
        run.step(chat, Step(tuple(tokens) if run.choose.flag() else tokens))
        for _ in range(run.choose.number(0, 3)):
            run.decode(chat)


@check
def replay_gives_the_same_tokens(run: Scenario) -> None:
    """The same calls give the same tokens, in a new session with the same id, on the same engine or a new one."""
    tokens, steps = run.choose.prompt(1, reserve=6), run.choose.number(1, 6)
    session_id = None
    for _ in range(2):
        chat = run.open(session_id)
        session_id = chat.id
        run.prefill(chat, tokens)
        for _ in range(steps):
            run.decode(chat)
        if run.choose.flag():
            run.close(chat)


@check
def prefill_in_pieces(run: Scenario) -> None:
    """A prompt may be prefilled in pieces of any size, before and after a decode."""
    chat = run.open()
    run.prefill(chat, run.choose.prompt(1, reserve=24))
    for _ in range(run.choose.number(0, 2)):
        run.prefill(chat, run.choose.tokens(1, 7))
    for _ in range(run.choose.number(1, 3)):
        run.decode(chat)
    run.prefill(chat, run.choose.tokens(1, 6))
    run.decode(chat)


@check
def decode_from_the_cache(run: Scenario) -> None:
    """Decoding from the KV cache gives the same tokens as computing all of it anew."""
    cached, evicted = run.open(), run.open()
    tokens = run.choose.prompt(1, reserve=8)
    run.prefill(cached, tokens)
    run.prefill(evicted, tokens)
    for _ in range(run.choose.number(1, 8)):
        run.decode(cached)
        run.evict(evicted)
        run.decode(evicted)


@about("this engine's KV cache never covers all tokens of a session")
def decode_from_a_full_cache(run: Scenario) -> None:
    """Decoding a session whose KV cache covers all tokens is right, or a ValueError that changes nothing."""
    chat = run.open()
    run.prefill(chat, run.choose.prompt(3, reserve=12))
    for _ in range(run.choose.number(1, 2)):
        run.decode(chat)
    covered = run.borrowing(chat, lambda state: state.kv_length)
    length = run.choose.one_of((covered, run.choose.number(1, len(chat.history) - 1)))
    run.rewind(chat, length, pending=0)
    run.proofs += run.borrowing(chat, lambda state: not state.pending)
    run.note(DECODE.on(chat))
    run.watch.begin_step()
    try:
        result = run.perform(run.call(chat, DECODE))
    except ValueError:
        run.remark("a ValueError")
    except Exception as error:
        raise run.failure("the right token, or a ValueError", error) from error
    else:
        run.take(chat, DECODE, result)
    run.check_all()
    run.prefill(chat, run.choose.tokens(1, 6))
    run.decode(chat)


@check
def sessions_interleaved(run: Scenario) -> None:
    """Sessions that take turns in any order get the tokens that each would get alone."""
    chats = [run.open() for _ in range(run.choose.number(2, 4))]
    for chat in chats:
        run.prefill(chat, run.choose.tokens(1, 6))
    for _ in range(run.choose.number(2, 8)):
        chat = run.choose.one_of(chats)
        tokens = run.choose.one_of(([], [], [], run.choose.tokens(1, 3)))
        run.step(chat, prefill(tokens) if tokens else DECODE)


@check
def shared_beginnings(run: Scenario) -> None:
    """Sessions that begin alike and then part, in any order of steps, get the tokens that each would get alone."""
    size = run.choose.one_of(
        [size for size in (4, 8, 2, 16) if 3 * size + 8 <= run.choose.max_tokens]
    )
    first = run.choose.number(0, 23)
    other = first + 3 if first // 3 % 2 == 0 else first - 3  # only the first block differs
    turns = run.choose.sequence(len(PARTINGS), 4, 24, 4)
    for kind, place, number, tail in [(0, 0, first, 1), *turns]:
        chats = run.open_chats or [run.open()]
        chat = chats[place % len(chats)]
        # Most of the sessions that begin have the same blocks, or almost the same.
        tokens = blocks(run, size, (first, other, number)[min(kind, 2)])
        tokens += text(number, tail, run.choose.vocab_size)
        (PARTINGS[kind] if chat.history else begin_another)(run, chat, tokens, size)
    for chat in run.open_chats:
        if run.room(chat):
            run.decode(chat)


def blocks(run: Scenario, size: int, number: int) -> list[int]:
    """Return up to three blocks of tokens, each one of two, so that they occur again, and at other places."""
    count, which = 1 + number % 3, number // 3
    return [
        token
        for place in range(count)
        for token in text(100 + (which >> place) % 2, size, run.choose.vocab_size)
    ]


def begin_another(run: Scenario, chat: Chat, tokens: list[int], size: int) -> None:
    """Begin another session with some tokens, and decode from it, if they are an odd number."""
    if not chat.history:  # it was just opened, as there was none
        run.prefill(chat, tokens)
    elif len(run.open_chats) < MOST_SESSIONS - 2 and len(tokens) < run.choose.max_tokens:
        other = run.open()
        run.prefill(other, tokens)
        decode_some(run, other, tokens[: len(tokens) % 2], size)


def begin_alike(run: Scenario, chat: Chat, tokens: list[int], size: int) -> None:
    """Begin another session with all that a session has, and a few more tokens."""
    begin_another(run, chat, [*chat.history, *tokens[size:][-3:]], size)


def decode_some(run: Scenario, chat: Chat, tokens: list[int], size: int) -> None:
    """Decode a few tokens."""
    for _ in range(min(len(tokens) % (size + 2), run.room(chat))):
        run.decode(chat)


def go_on(run: Scenario, chat: Chat, tokens: list[int], size: int) -> None:
    """Prefill some tokens and decode, if there is room."""
    if run.room(chat) > len(tokens):
        run.prefill(chat, tokens)
        run.decode(chat)


def part_here(run: Scenario, chat: Chat, tokens: list[int], size: int) -> None:
    """Go back to somewhere near the end of a block, and on with other tokens."""
    run.rewind(chat, max(min(size + len(tokens) % (2 * size) - 2, len(chat.history)), 1))
    go_on(run, chat, list(reversed(tokens[-size - 1 :])), size)


def reuse_beginning(run: Scenario, chat: Chat, tokens: list[int], size: int) -> None:
    """Go on with other tokens, some of which may be those that are there."""
    run.reuse_prefix(chat, tokens)
    run.decode(chat)


def branch_here(run: Scenario, chat: Chat, tokens: list[int], size: int) -> None:
    """Branch off at somewhere near the end of a block, and go on in the branch."""
    if len(run.open_chats) < MOST_SESSIONS - 2:
        length = max(min(size + len(tokens) % (2 * size) - 2, len(chat.history)), 1)
        decode_some(run, run.branch(chat, length), [*tokens[:1]], size)


Parting: TypeAlias = Callable[[Scenario, Chat, list[int], int], None]
PARTINGS: Final[Sequence[Parting]] = (
    begin_another,
    begin_another,
    part_here,
    decode_some,
    lambda run, chat, tokens, size: run.close(chat),
    go_on,
    part_here,
    reuse_beginning,
    begin_alike,
    lambda run, chat, tokens, size: run.evict(chat),
    branch_here,
    part_here,
)


# Batches

NO_BATCHES: Final = "this engine has no `decode_batch`"


def has_batches(run: Scenario) -> bool:
    """Whether the engine decodes batches."""
    return callable(getattr(run.engine, "decode_batch", None))


def open_some(run: Scenario, least: int, most: int) -> list[Chat]:
    """Begin some sessions, of different lengths."""
    chats = [run.open() for _ in range(run.choose.number(least, most))]
    for chat in chats:
        run.prefill(chat, run.choose.prompt(1, reserve=24))
    return chats


def some_of(run: Scenario, chats: Sequence[Chat]) -> list[Chat]:
    """Choose some sessions, or all of them, in any order."""
    rest, chosen = list(chats), list[Chat]()
    for _ in range(len(chats) if run.choose.flag() else run.choose.number(1, len(chats))):
        chosen.append(rest.pop(run.choose.number(0, len(rest) - 1)))
    return chosen


@about(NO_BATCHES)
def batches(run: Scenario) -> None:
    """A batch of any sessions, of any lengths and in any order, gives each the token that it would get alone."""
    if not has_batches(run):
        return
    chats = open_some(run, 1, 6)
    for _ in range(run.choose.number(1, 4)):
        run.choose.one_of(CHANGES)(run, run.choose.one_of(chats))
        run.decode_batch(some_of(run, chats))
        run.proofs += 1


CHANGES: Final[Sequence[Callable[[Scenario, Chat], object]]] = (
    lambda run, chat: None,
    lambda run, chat: run.decode(chat),
    lambda run, chat: run.evict(chat),
    lambda run, chat: run.rewind(chat, run.choose.number(1, len(chat.history))),
    lambda run, chat: run.prefill(chat, run.choose.tokens(1, 3)),
)
"""How a session may be changed between two batches."""


@about(NO_BATCHES)
def bad_batches_are_refused(run: Scenario) -> None:
    """A batch with a session that can't be decoded is refused with that session's error, and changes nothing."""
    if not has_batches(run):
        return
    chats = open_some(run, 1, 3)
    good = some_of(run, chats)
    kind = run.choose.one_of(("empty", "twice", "closed", "foreign", "borrowed"))
    bad = good[-1] if kind == "twice" else a_bad_one(run, kind)
    place = run.choose.number(0, len(good))
    batch = [*good[:place], bad, *good[place:]]
    names = ", ".join(map(str, batch))
    call = run.batch_call(batch)
    if kind == "borrowed":
        run.note(f"with slots.borrow({bad}): engine.decode_batch([{names}])", *batch)
        run.refused(lambda: run.borrowing(bad, lambda state: call()), REFUSALS[kind])
        run.decode(bad)
    else:
        run.note(f"engine.decode_batch([{names}])", *batch)
        run.refused(call, REFUSALS[kind])
    run.proofs += 1
    run.decode_batch(good)


REFUSALS: Final[dict[str, type[Exception]]] = {
    "empty": ValueError,
    "twice": SessionBusyError,
    "closed": SessionClosedError,
    "foreign": SessionOwnerError,
    "borrowed": SessionBusyError,
}
"""The errors for bad sessions in a batch."""


def a_bad_one(run: Scenario, kind: str) -> Chat:
    """Return a session that can't be decoded, or one that will be borrowed."""
    tokens = run.choose.tokens(1, 4)
    if kind == "foreign":
        return run.open_foreign(tokens)
    chat = run.open()
    if kind != "empty":
        run.prefill(chat, tokens)
    if kind == "closed":
        run.close(chat)
    return chat


@about(NO_BATCHES)
def failure_in_a_batch(run: Scenario) -> None:
    """A batch that fails leaves no trace in any of its sessions, and the next one is right."""
    if not has_batches(run):
        return
    chats = open_some(run, 1, 4)
    batch = some_of(run, chats)
    run.decode_batch(batch)
    places = run.events
    for error in ERRORS:
        if run.choose.number(0, 3) or not run.proofs:
            fault = Fault(can_fail, run.choose.number(0, places - 1), error())
            if fail_batch(run, batch, fault):
                run.proofs += 1
                run.decode_batch(batch)
    run.decode(run.choose.one_of(chats))


# Failing steps


def fail_steps(
    run: Scenario,
    events: Sequence[str],
    *,
    advanced: bool | None = None,
    shortest: int = 1,
    only_decode: bool = False,
) -> None:
    """Make steps fail at some events, before or after they first advanced, with each kind of error, and go on."""
    chat, other = run.open(), run.open()
    run.prefill(other, run.choose.tokens(1, 4))
    run.decode(other)
    if only_decode or run.choose.flag():
        run.prefill(chat, run.choose.prompt(1, reserve=24))
        for _ in range(run.choose.number(0, 2)):
            run.decode(chat)
    events = [event for event in events if event in run.watch.seen] or events

    def fail(error: BaseException, *, decode: bool) -> None:
        step = DECODE if decode else a_prefill(run, chat, shortest)
        if fail_step(run, chat, step, a_fault(run, events, error, advanced=advanced)):
            run.proofs += 1
            run.step(chat, step)

    for error in ERRORS:
        # Hypothesis leaves out all steps not needed to show a failure.
        if run.choose.number(0, 7):
            fail(error(), decode=only_decode or (bool(chat.history) and run.choose.flag()))
    if not run.proofs:
        fail(run.choose.one_of(ERRORS)(), decode=only_decode)
    run.decode(chat)
    run.decode(other)


def a_fault(
    run: Scenario, events: Sequence[str], error: BaseException, *, advanced: bool | None = None
) -> Fault:
    """Raise an error at one of some events."""
    chosen = run.choose.one_of(events)

    def at(event: Event) -> bool:
        return str(event) == chosen and advanced in (None, event.advances > 0)

    return Fault(at, run.choose.one_of((0, 0, 0, 1)), error)


def a_step(run: Scenario, chat: Chat) -> Step:
    """Choose a possible step."""
    if chat.history and run.choose.flag():
        return DECODE
    return a_prefill(run, chat)


def a_prefill(run: Scenario, chat: Chat, shortest: int = 1) -> Step:
    """Choose some tokens to prefill; fewer than usual if there is little room left."""
    longest = min(shortest + 7, max(run.room(chat) // 8, 1))
    return prefill(run.choose.tokens(min(shortest, longest), longest))


@check
def failure_before_the_model_ran(run: Scenario) -> None:
    """A step that fails before the model ran leaves no trace, and the next one is right."""
    events = [
        "before append",
        "before pending",
        "before chunks",
        "before kv_length",
        "before token_history",
        "before kv_cache",
        "before create",
    ]
    fail_steps(run, events, advanced=False)


@check
def failure_before_advance(run: Scenario) -> None:
    """A step that fails after the model ran, and before `advance`, leaves no trace, and the next one is right."""
    fail_steps(run, ["before advance", "before kv_cache =", "after length"])


@check
def failure_after_advance(run: Scenario) -> None:
    """A step that fails after `advance`, or at its end, leaves no trace, and the next one is right."""
    events = ["before the commit", "before append", "before pending", "before chunks"]
    fail_steps(run, events, advanced=True)


@about("no step of this engine feeds its tokens in more than one piece; let it use smaller chunks")
def failure_between_chunks(run: Scenario) -> None:
    """A step that fails between the chunks of its tokens leaves no trace, and the next one is right."""
    events = ["before advance", "before kv_cache", "before pending", "before chunks"]
    fail_steps(run, events, advanced=True, shortest=6)


@check
def failure_at_append(run: Scenario) -> None:
    """A step that fails when the decoded token is appended leaves no trace, and the next one is right."""
    fail_steps(run, ["before append", "before the commit"], only_decode=True)


@about("this engine gives StateSlots no `truncate`")
def failure_in_truncate(run: Scenario) -> None:
    """A failure in `truncate`, in a rewind or when a failed step is taken back, leaves no trace."""
    chat = run.open()
    run.prefill(chat, run.choose.prompt(2, reserve=24))
    for _ in range(run.choose.number(1, 3)):
        run.decode(chat)
    if run.choose.flag():
        run.evict(chat)
        run.decode(chat)
    fault = a_fault(run, ["before truncate", "after truncate"], run.choose.one_of(ERRORS)())
    if run.choose.flag():
        run.proofs += fail_rewind(run, chat, run.choose.number(1, len(chat.history) - 1), fault)
    else:
        run.proofs += fail_step_twice(run, chat, a_step(run, chat), fault)
    run.step(chat, a_step(run, chat))
    run.decode(chat)


@about("no `fail_in` says what can fail inside the model")
def failure_in_the_model(run: Scenario) -> None:
    """A step that fails inside the model, before or after a part of it did its work, leaves no trace."""
    if not run.parts:
        return
    chat = run.open()
    run.prefill(chat, run.choose.prompt(2, reserve=24))
    run.inside = run.parts
    for error in run.choose.one_of((ERRORS[:1], ERRORS[:2], ERRORS[1:])):
        event = (
            f"{run.choose.one_of(('before', 'after'))} {part_name(run.choose.one_of(run.parts))}"
        )
        decode, before = run.choose.flag(), run.watch.seen[event]
        run.step(chat, DECODE if decode else a_prefill(run, chat))
        most = max(run.watch.seen[event] - before - 1, 0)  # calls of that part in such a step
        step = DECODE if decode else a_prefill(run, chat)
        if fail_step(run, chat, step, fault_at(event, run.choose.number(0, most), error())):
            run.proofs += 1
            run.step(chat, step)
    run.decode(chat)


def fault_at(event: str, skip: int, error: BaseException) -> Fault:
    """Raise an error at an event, after so many others of its kind."""
    return Fault(lambda it: str(it) == event, skip, error)


# Going back


@check
def rewind(run: Scenario) -> None:
    """A session that was rewound goes on as a fresh one with those tokens would."""
    chat = run.open()
    run.prefill(chat, run.choose.prompt(1, reserve=24))
    for _ in range(run.choose.number(1, 3)):
        for _ in range(run.choose.number(0, 3)):
            run.decode(chat)
        run.rewind(chat, run.choose.number(1, len(chat.history)))
        if run.choose.flag():
            run.prefill(chat, run.choose.tokens(1, 4))
        run.decode(chat)


@check
def reuse_prefix(run: Scenario) -> None:
    """A session that reuses a prefix of its tokens goes on as a fresh one with the new tokens would."""
    chat = run.open()
    run.prefill(chat, run.choose.prompt(1, reserve=24))
    for _ in range(run.choose.number(1, 3)):
        for _ in range(run.choose.number(0, 3)):
            run.decode(chat)
        kept = chat.history[: run.choose.number(0, len(chat.history))]
        run.reuse_prefix(chat, kept + run.choose.tokens(0 if kept else 1, 4))
        run.decode(chat)


@about("this engine gives StateSlots no `truncate`")
def truncate_falls_short(run: Scenario) -> None:
    """A session goes on right when `truncate` kept fewer tokens than it could have."""
    chat = run.open()
    run.prefill(chat, run.choose.prompt(2, reserve=24))
    run.decode(chat)
    run.watch.short = run.choose.number(1, 8)
    run.calls.append(f"# truncate(kv_cache, n) is now called for n - {run.watch.short} instead")
    before = run.watch.seen["before truncate"]
    if run.choose.flag():
        run.rewind(chat, run.choose.number(1, len(chat.history)))
    else:
        fail_step(run, chat, a_step(run, chat), a_fault(run, ["before advance"], ERRORS[0]()))
    run.proofs += run.watch.seen["before truncate"] - before
    run.step(chat, a_step(run, chat))
    run.decode(chat)


# Keys


@about(simple=True)
def key_changes(run: Scenario) -> None:
    """A session that was borrowed under another key goes on as if all were computed anew."""
    chat, other = run.open(), run.open()
    for one in (chat, other):
        run.prefill(one, run.choose.prompt(1, reserve=24))
    for _ in range(run.choose.number(1, 3)):
        for _ in range(run.choose.number(0, 2)):
            run.decode(chat)
        use_another_key(run, chat)
        if run.choose.flag():
            run.prefill(chat, run.choose.tokens(1, 4))
        run.decode(chat)
    run.decode(other)


def use_another_key(run: Scenario, chat: Chat) -> None:
    """Borrow a session under a key that the engine doesn't use."""
    slots, key = chat.slots, "a key of the kit"
    assert slots is not None
    run.note(f"with slots.borrow({chat}, {key=}): pass", chat)
    run.watch.begin_step()

    def borrow() -> None:
        with slots.borrow(chat.session, key=key):
            pass

    run.attempt(borrow)
    run.check_all()


# Branches and files


@check
def branches(run: Scenario) -> None:
    """A branch goes on from the tokens that it was given, and it and its parent leave each other alone."""
    chats = [run.open()]
    run.prefill(chats[0], run.choose.prompt(2, reserve=24))
    for _ in range(run.choose.number(0, 3)):
        run.decode(chats[0])
    for _ in range(run.choose.number(1, 3)):
        parent = run.choose.one_of(chats)
        count = len(parent.history)
        length = run.choose.one_of((count, run.choose.number(1, count)))
        chats.append(run.branch(parent, length))
        for _ in range(run.choose.number(0, 3)):
            run.choose.one_of(CHANGES)(run, run.choose.one_of(chats))
    if run.choose.flag():
        run.close(chats.pop(run.choose.number(0, len(chats) - 1)))
    for chat in chats:
        run.decode(chat)


@about("this engine gives StateSlots no `dump` and `load`")
def save_and_restore(run: Scenario) -> None:
    """A session that is saved and restored, in the same engine or another one, goes on with its KV cache."""
    chat = run.open()
    run.prefill(chat, run.choose.prompt(2, reserve=24))
    for _ in range(run.choose.number(0, 2)):
        run.choose.one_of(CHANGES)(run, chat)
    run.decode(chat)
    slots, history = chat.slots, list(chat.history)
    if slots is None or slots.dump is None:
        return
    covered = run.borrowing(chat, lambda state: state.kv_length)
    moved, elsewhere = run.choose.flag(), run.choose.flag()
    with TemporaryDirectory() as folder:
        path = str(Path(folder, "session"))
        run.save(chat, path, move=moved or elsewhere)
        if elsewhere:
            slots = run.replace_engine(history[:2])
        restored = run.restore(slots, path, history, covered)
    run.proofs += covered > 0
    for one in [restored] if moved or elsewhere else [restored, chat, restored]:
        run.decode(one)


# Threads


def anywhere(event: Event) -> bool:
    """Whether this is somewhere in a step."""
    return True


def between_borrows(event: Event) -> bool:
    """Whether this is in a step, but not in its borrow."""
    return str(event) in {"before borrow", "after the borrow"}


@check
def two_threads_on_one_session(run: Scenario) -> None:
    """Of two threads that step one session at once, one wins and the other gets SessionBusyError at once."""
    chat = run.open()
    run.prefill(chat, run.choose.tokens(1, 6))
    run.decode(chat)
    events = run.events
    if run.choose.flag():
        run.evict(chat)
    for at, places in ((anywhere, events), (between_borrows, 2)):
        if run.choose.number(0, 7):
            pause = Pause(at, run.choose.number(0, places - 1), chat)
            race(run, chat, a_step(run, chat), a_step(run, chat), pause)
    run.decode(chat)


@check
def two_threads_on_two_sessions(run: Scenario) -> None:
    """Two threads that step two sessions at once get what each would get alone."""
    chat, other = run.open(), run.open()
    for one in (other, chat):
        run.prefill(one, run.choose.prompt(1, reserve=24))
    run.inside = run.parts if run.choose.flag() else ()
    run.decode(chat)
    places = run.events

    def at(event: Event) -> bool:
        return event.witness is (None if run.inside else chat.witness)

    for _ in range(run.choose.number(1, 4)):
        first, second = (
            DECODE if run.choose.flag() else a_prefill(run, one, shortest=4)
            for one in (chat, other)
        )
        pause = Pause(at, run.choose.number(0, places - 1), chat)
        step_together(run, [(chat, first), (other, second)], pause)
    for one in (chat, other):
        run.decode(one)


# Closing


@check
def close_releases_once(run: Scenario) -> None:
    """Closing a session frees its KV cache, once, and leaves other sessions alone."""
    chats = [run.open() for _ in range(run.choose.number(1, 3))]
    for chat in chats:
        run.prefill(chat, run.choose.tokens(1, 6))
        run.decode(chat)
    going, *staying = chats
    if run.choose.flag():
        run.rewind(going, run.choose.number(1, len(going.history)))
        run.decode(going)
    if run.choose.flag():
        run.evict(going)
    for _ in range(run.choose.number(1, 2)):
        run.close(going)
    new = [run.open(), run.open()]  # two, as what was freed twice would be theirs both
    for chat in new:
        run.prefill(chat, run.choose.tokens(1, 6))
    for chat in [*staying, *new]:
        run.decode(chat)


@check
def close_in_mid_step(run: Scenario) -> None:
    """Closing a session in the middle of a step frees its KV cache, once, when that step has ended."""
    chat, other = run.open(), run.open()
    run.prefill(other, run.choose.tokens(1, 6))
    run.decode(other)
    places = run.events
    if run.choose.flag():
        run.prefill(chat, run.choose.tokens(1, 6))
    close = Close(anywhere, run.choose.number(0, places - 1), chat)
    close_within(run, chat, a_step(run, chat), close)
    run.refuse(chat, DECODE, SessionClosedError)
    run.decode(other)


@about(simple=True)
def dropped_session_is_released(run: Scenario) -> None:
    """A session that is dropped without being closed is garbage, and its KV cache is released, once."""
    run.prefill(run.open(), run.choose.tokens(1, 6))
    run.decode(run.last)
    if run.choose.flag():
        run.evict(run.last)
        run.decode(run.last)
    run.drop_last()
    chat = run.open()
    run.prefill(chat, run.choose.tokens(1, 6))
    run.decode(chat)


IN_A_ROW: Final = 12
"""Sessions of which the memory is measured together."""
LEAST: Final = 5
"""How often they are served at least: lost handles are missed only after a while."""
MOST: Final = 20
"""How often, if memory grows each time: the caches of libraries grow, too, but not for ever."""


@check
def closed_sessions_leave_nothing(run: Scenario) -> None:
    """Sessions that were closed leave nothing behind, however many there were."""
    prompt = text(0, 3, run.choose.vocab_size)
    run.calls.append(
        f"for _ in range({MOST * IN_A_ROW}):\n"
        f"    a = Session()\n"
        f"    engine.prefill(a, {prompt})\n"
        "    engine.decode(a)\n"
        "    with slots.borrow(a) as state: state.rewind(2)\n"
        "    engine.decode(a)\n"
        "    slots.evict(a)\n"
        "    engine.decode(a)\n"
        "    a.close()"
    )
    ids = Random(2)  # noqa: S311 not for secrets
    growth: list[int] = []
    after = blocks_in_use()
    while len(growth) < LEAST or (min(growth[1:]) >= IN_A_ROW and len(growth) < MOST):
        before = after
        for place in range(IN_A_ROW):
            try:
                serve(run, UUID(int=ids.getrandbits(128), version=4), prompt)
            except Exception as error:
                served = len(growth) * IN_A_ROW + place
                raise run.broken("no error", f"after {served} sessions, {told(error)}") from error
        after = blocks_in_use()
        growth.append(after - before)
    if min(growth[1:]) >= IN_A_ROW:
        average = sum(growth[1:]) / len(growth[1:]) / IN_A_ROW
        raise run.broken(
            "as much memory in use as before, when all sessions are closed",
            f"more with each session: {average:.1f} blocks, on average",
        )


def serve(run: Scenario, session_id: UUID, prompt: list[int]) -> None:
    """Serve a session that nobody watches, from its beginning to its end."""
    with Session.with_id(session_id) as session:
        run.engine.prefill(session, list(prompt))
        run.engine.decode(session)
        slots = slots_of(session)
        if slots is not None:
            with slots.borrow(session, key=session._key) as state:
                state.rewind(2)
            run.engine.decode(session)
            slots.evict(session)
            run.engine.decode(session)


def blocks_in_use() -> int:
    """Return how much memory Python uses."""
    gc.collect()
    return sys.getallocatedblocks()


@about(simple=True)
def id_used_again_after_close(run: Scenario) -> None:
    """A new session with the id of one that was closed begins anew."""
    first = run.open()
    run.prefill(first, run.choose.tokens(1, 8))
    for _ in range(run.choose.number(0, 3)):
        run.decode(first)
    run.close(first)
    second = run.open(first.id)
    run.prefill(second, run.choose.tokens(1, 8))
    for _ in range(run.choose.number(1, 3)):
        run.decode(second)


# Refusals


@about(simple=True)
def bad_tokens_are_refused(run: Scenario) -> None:
    """Tokens that aren't in the vocabulary are a ValueError, and change nothing."""
    chat = run.open()
    if run.choose.flag():
        run.prefill(chat, run.choose.tokens(1, 6))
    size = run.choose.vocab_size
    for bad in (-1, size, size + 1, 2**31 - 1, 2**31, 2**63, -(2**31), 2**32):
        if run.choose.one_of((False, True, True, True)):
            before, after = run.choose.tokens(0, 3), run.choose.tokens(0, 3)
            run.refuse(chat, prefill([*before, bad, *after]), ValueError)
    run.prefill(chat, run.choose.tokens(1, 6))
    run.decode(chat)


@about(simple=True)
def empty_session_is_refused(run: Scenario) -> None:
    """Decoding a session without tokens is a ValueError, and changes nothing."""
    chat = run.open()
    if run.choose.flag():
        run.prefill(chat, run.choose.tokens(1, 4))
        run.rewind(chat, 0)
    run.refuse(chat, DECODE, ValueError)
    run.prefill(chat, run.choose.tokens(1, 6))
    run.decode(chat)


@about(simple=True)
def closed_session_is_refused(run: Scenario) -> None:
    """A session that was closed is refused with SessionClosedError."""
    chat, other = run.open(), run.open()
    run.prefill(other, run.choose.tokens(1, 6))
    if run.choose.flag():
        run.prefill(chat, run.choose.tokens(1, 6))
    run.close(chat)
    run.refuse(chat, DECODE, SessionClosedError)
    run.refuse(chat, prefill(run.choose.tokens(1, 6)), SessionClosedError)
    run.decode(other)


@about(simple=True)
def foreign_session_is_refused(run: Scenario) -> None:
    """A session that was begun by something else is refused with SessionOwnerError, and not changed."""
    chat, foreign = run.open(), run.open_foreign(run.choose.tokens(1, 6))
    run.prefill(chat, run.choose.tokens(1, 6))
    run.refuse(foreign, DECODE, SessionOwnerError)
    run.refuse(foreign, prefill(run.choose.tokens(1, 6)), SessionOwnerError)
    run.decode(chat)


# All together


def any_prefill(run: Scenario, chat: Chat, tokens: list[int], number: int) -> None:
    """Prefill."""
    if len(tokens) <= run.room(chat):
        run.prefill(chat, tokens)


def any_decode(run: Scenario, chat: Chat, tokens: list[int], number: int) -> None:
    """Decode, or be refused."""
    if not chat.history:
        run.refuse(chat, DECODE, ValueError)
    elif run.room(chat):
        run.decode(chat)


def any_evict(run: Scenario, chat: Chat, tokens: list[int], number: int) -> None:
    """Evict."""
    run.evict(chat)


def any_rewind(run: Scenario, chat: Chat, tokens: list[int], number: int) -> None:
    """Rewind."""
    run.rewind(chat, number % (len(chat.history) + 1))


def any_reuse(run: Scenario, chat: Chat, tokens: list[int], number: int) -> None:
    """Reuse a prefix."""
    kept = chat.history[: number % (len(chat.history) + 1)]
    run.reuse_prefix(chat, kept + tokens[: run.choose.max_tokens - len(kept)])


def any_failure(run: Scenario, chat: Chat, tokens: list[int], number: int) -> None:
    """Make a step fail."""
    step = DECODE if chat.history and number % 2 else prefill(tokens)
    if run.room(chat) >= len(tokens):
        fail_step(run, chat, step, Fault(can_fail, number, ERRORS[number % len(ERRORS)]()))


def any_bad_tokens(run: Scenario, chat: Chat, tokens: list[int], number: int) -> None:
    """Prefill a token outside the vocabulary."""
    run.refuse(chat, prefill([*tokens, run.choose.vocab_size + number]), ValueError)


def any_reopening(run: Scenario, chat: Chat, tokens: list[int], number: int) -> None:
    """Close a session, and open another with its id."""
    run.close(chat)
    run.refuse(chat, DECODE, SessionClosedError)
    run.reopen(chat)


def any_foreign(run: Scenario, chat: Chat, tokens: list[int], number: int) -> None:
    """Step another engine's session."""
    foreign = run.open_foreign(tokens)
    run.refuse(foreign, DECODE if number % 2 else prefill(tokens), SessionOwnerError)
    run.forget(foreign)


ANY: Final[Sequence[Callable[[Scenario, Chat, list[int], int], None]]] = (
    any_prefill,
    any_decode,
    any_decode,
    any_prefill,
    any_decode,
    any_decode,
    any_rewind,
    any_reuse,
    any_evict,
    any_failure,
    any_bad_tokens,
    any_foreign,
    any_reopening,
)


def can_fail(event: Event) -> bool:
    """Whether a step can fail here."""
    return event.name not in {"borrow", "the borrow", "release", "truncate"}


@check
def any_sequence_of_calls(run: Scenario) -> None:
    """After any calls on some sessions, in any order, each has the same tokens as it would have alone."""
    chats = [run.open() for _ in range(run.choose.number(1, 4))]
    for kind, place, which, length, number in run.choose.sequence(len(ANY), len(chats), 16, 8, 16):
        tokens = text(which, length + 1, run.choose.vocab_size)
        ANY[kind](run, chats[place], tokens, number)
