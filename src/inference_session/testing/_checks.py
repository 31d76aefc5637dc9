"""The checks: one promise each, and a test by which Hypothesis tries to break it.

The first line of a check's docstring is its promise, and is shown when it's broken.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Final, TypeAlias

from attrs import frozen

from inference_session.exceptions import SessionClosedError, SessionOwnerError
from inference_session.testing._faults import (
    ERRORS,
    Close,
    Fault,
    close_within,
    fail_rewind,
    fail_step,
    fail_step_twice,
)
from inference_session.testing._leaks import leave_nothing
from inference_session.testing._race import Pause, race
from inference_session.testing._run import DECODE, MOST_TOKENS, Run, Step, Talk, prefill
from inference_session.testing._watch import Event


Function: TypeAlias = Callable[[Run], None]


@frozen
class Check:
    """A promise, and its test."""

    name: str
    promise: str
    run: Function
    vacuous: str = ""
    """The reason for skipping the check if its subject never happens."""


CHECKS: Final[dict[str, Check]] = {}
"""All checks by name, the most basic first."""


def check(function: Function) -> Function:
    """Make a function a check."""
    return about()(function)


def about(vacuous: str = "") -> Callable[[Function], Function]:
    """Make a function a check whose subject must happen at least once."""

    def register(function: Function) -> Function:
        promise = (function.__doc__ or "").partition("\n")[0]
        CHECKS[function.__name__] = Check(function.__name__, promise, function, vacuous)
        return function

    return register


# Input and output


@check
def tokens_reach_the_session(run: Run) -> None:
    """Prefill adds its tokens to the session, in order, and decode adds the token that it returns."""
    talk = run.open()
    for _ in range(run.choose.number(1, 3)):
        tokens = run.choose.tokens(1, 8)
        run.step(talk, Step(tuple(tokens) if run.choose.flag() else tokens))
        for _ in range(run.choose.number(0, 3)):
            run.decode(talk)


@check
def replay_gives_the_same_tokens(run: Run) -> None:
    """The same calls give the same tokens, in a new session with the same id, on the same engine or a new one."""
    tokens, steps = run.choose.tokens(1, 8), run.choose.number(1, 6)
    session_id = None
    for _ in range(2):
        talk = run.open(session_id)
        session_id = talk.id
        run.prefill(talk, tokens)
        for _ in range(steps):
            run.decode(talk)
        if run.choose.flag():
            run.close(talk)


@check
def prefill_in_pieces(run: Run) -> None:
    """A prompt may be prefilled in pieces of any size, before and after a decode."""
    talk = run.open()
    for _ in range(run.choose.number(1, 4)):
        run.prefill(talk, run.choose.tokens(1, 6))
    for _ in range(run.choose.number(1, 3)):
        run.decode(talk)
    run.prefill(talk, run.choose.tokens(1, 6))
    run.decode(talk)


@check
def decode_from_the_cache(run: Run) -> None:
    """Decoding from the KV cache gives the same tokens as computing all of it anew."""
    cached, evicted = run.open(), run.open()
    tokens = run.choose.tokens(1, 12)
    run.prefill(cached, tokens)
    run.prefill(evicted, tokens)
    for _ in range(run.choose.number(1, 8)):
        run.decode(cached)
        run.evict(evicted)
        run.decode(evicted)


@check
def sessions_interleaved(run: Run) -> None:
    """Sessions that take turns in any order get the tokens that each would get alone."""
    talks = [run.open() for _ in range(run.choose.number(2, 4))]
    for talk in talks:
        run.prefill(talk, run.choose.tokens(1, 6))
    for _ in range(run.choose.number(2, 12)):
        talk = run.choose.one_of(talks)
        tokens = run.choose.one_of(([], [], [], run.choose.tokens(1, 3)))
        run.step(talk, prefill(tokens) if tokens else DECODE)


# Failing steps


def fail_steps(
    run: Run,
    events: Sequence[str],
    *,
    advanced: bool | None = None,
    shortest: int = 1,
    only_decode: bool = False,
) -> None:
    """Make steps fail at some events, before or after they first advanced, with each kind of error, and go on."""
    talk, other = run.open(), run.open()
    run.prefill(other, run.choose.tokens(1, 4))
    run.decode(other)
    if only_decode or run.choose.flag():
        run.prefill(talk, run.choose.tokens(1, 8))
        for _ in range(run.choose.number(0, 2)):
            run.decode(talk)
    events = [event for event in events if event in run.watch.seen] or events

    def fail(error: BaseException, *, decode: bool) -> None:
        step = DECODE if decode else a_prefill(run, talk, shortest)
        if fail_step(run, talk, step, a_fault(run, events, error, advanced=advanced)):
            run.proofs += 1
            run.step(talk, step)

    for error, decode in product(ERRORS, (True, False)):
        # Hypothesis leaves out all steps not needed to show a failure.
        if run.choose.number(0, 7) and (talk.history if decode else not only_decode):
            fail(error(), decode=decode)
    if not run.proofs:
        fail(run.choose.one_of(ERRORS)(), decode=only_decode)
    run.decode(talk)
    run.decode(other)


def a_fault(
    run: Run, events: Sequence[str], error: BaseException, *, advanced: bool | None = None
) -> Fault:
    """Raise an error at one of some events."""
    chosen = run.choose.one_of(events)

    def at(event: Event) -> bool:
        return str(event) == chosen and advanced in (None, event.advances > 0)

    return Fault(at, run.choose.one_of((0, 0, 0, 1)), error)


def a_step(run: Run, talk: Talk) -> Step:
    """Choose a possible step."""
    if talk.history and run.choose.flag():
        return DECODE
    return a_prefill(run, talk)


def a_prefill(run: Run, talk: Talk, shortest: int = 1) -> Step:
    """Choose some tokens to prefill; fewer than usual if there is little room left."""
    longest = min(shortest + 7, max(talk.room // 8, 1))
    return prefill(run.choose.tokens(min(shortest, longest), longest))


@check
def failure_before_the_model_ran(run: Run) -> None:
    """A step that fails before the model ran leaves no trace, and the next one is right."""
    events = [
        "before append",
        "after append",
        "before pending",
        "after pending",
        "before kv_cache",
        "after kv_cache",
        "before create",
    ]
    fail_steps(run, events, advanced=False)


@check
def failure_before_advance(run: Run) -> None:
    """A step that fails after the model ran, and before `advance`, leaves no trace, and the next one is right."""
    fail_steps(
        run,
        ["before advance", "before kv_cache =", "after kv_cache ="],
    )


@check
def failure_after_advance(run: Run) -> None:
    """A step that fails after `advance`, or at its end, leaves no trace, and the next one is right."""
    fail_steps(run, ["after advance", "after last line"])


@about("no step of this engine feeds its tokens in more than one piece; let it use smaller chunks")
def failure_between_chunks(run: Run) -> None:
    """A step that fails between the chunks of its tokens leaves no trace, and the next one is right."""
    events = ["before advance", "before kv_cache", "before pending"]
    fail_steps(run, events, advanced=True, shortest=6)


@check
def failure_at_append(run: Run) -> None:
    """A step that fails when the decoded token is appended leaves no trace, and the next one is right."""
    fail_steps(run, ["before append", "after append"], only_decode=True)


@about("this engine gives StateSlots no `truncate`")
def failure_in_truncate(run: Run) -> None:
    """A failure in `truncate`, in a rewind or when a failed step is taken back, leaves no trace."""
    talk = run.open()
    run.prefill(talk, run.choose.tokens(2, 8))
    for _ in range(run.choose.number(1, 3)):
        run.decode(talk)
    if run.choose.flag():
        run.evict(talk)
        run.decode(talk)
    fault = a_fault(run, ["before truncate", "after truncate"], run.choose.one_of(ERRORS)())
    if run.choose.flag():
        run.proofs += fail_rewind(run, talk, run.choose.number(1, len(talk.history) - 1), fault)
    else:
        run.proofs += fail_step_twice(run, talk, a_step(run, talk), fault)
    run.step(talk, a_step(run, talk))
    run.decode(talk)


# Going back


@check
def rewind(run: Run) -> None:
    """A session that was rewound goes on as a fresh one with those tokens would."""
    talk = run.open()
    run.prefill(talk, run.choose.tokens(1, 8))
    for _ in range(run.choose.number(1, 3)):
        for _ in range(run.choose.number(0, 3)):
            run.decode(talk)
        run.rewind(talk, run.choose.number(1, len(talk.history)))
        if run.choose.flag():
            run.prefill(talk, run.choose.tokens(1, 4))
        run.decode(talk)


@check
def reuse_prefix(run: Run) -> None:
    """A session that reuses a prefix of its tokens goes on as a fresh one with the new tokens would."""
    talk = run.open()
    run.prefill(talk, run.choose.tokens(1, 8))
    for _ in range(run.choose.number(1, 3)):
        for _ in range(run.choose.number(0, 3)):
            run.decode(talk)
        kept = talk.history[: run.choose.number(0, len(talk.history))]
        run.reuse_prefix(talk, kept + run.choose.tokens(0 if kept else 1, 4))
        run.decode(talk)


# One at a time


def anywhere(event: Event) -> bool:
    """Whether this is somewhere in a step."""
    return True


def between_borrows(event: Event) -> bool:
    """Whether this is in a step, but not in its borrow."""
    return str(event) in {"before borrow", "after end of borrow"}


@check
def two_threads_on_one_session(run: Run) -> None:
    """Of two threads that step one session at once, one wins and the other gets SessionBusyError at once."""
    talk = run.open()
    run.prefill(talk, run.choose.tokens(1, 6))
    if run.choose.flag():
        run.evict(talk)
    for at, places in ((anywhere, 24), (between_borrows, 2)):
        if run.choose.number(0, 7):
            pause = Pause(at, run.choose.number(0, places - 1), talk)
            race(run, talk, a_step(run, talk), a_step(run, talk), pause)
    run.decode(talk)


# Closing


@check
def close_releases_once(run: Run) -> None:
    """Closing a session frees its KV cache, once, and leaves other sessions alone."""
    talks = [run.open() for _ in range(run.choose.number(1, 3))]
    for talk in talks:
        run.prefill(talk, run.choose.tokens(1, 6))
        run.decode(talk)
    going, *staying = talks
    if run.choose.flag():
        run.rewind(going, run.choose.number(1, len(going.history)))
        run.decode(going)
    if run.choose.flag():
        run.evict(going)
    for _ in range(run.choose.number(1, 2)):
        run.close(going)
    new = run.open()
    run.prefill(new, run.choose.tokens(1, 6))
    for talk in [*staying, new]:
        run.decode(talk)


@check
def close_in_mid_step(run: Run) -> None:
    """Closing a session in the middle of a step frees its KV cache, once, when that step has ended."""
    talk, other = run.open(), run.open()
    run.prefill(other, run.choose.tokens(1, 6))
    if run.choose.flag():
        run.prefill(talk, run.choose.tokens(1, 6))
    close_within(run, talk, a_step(run, talk), Close(anywhere, run.choose.number(0, 23), talk))
    run.refuse(talk, DECODE, SessionClosedError)
    run.decode(other)


@check
def dropped_session_is_released(run: Run) -> None:
    """A session that is dropped without being closed is garbage, and its KV cache is released, once."""
    run.prefill(run.open(), run.choose.tokens(1, 6))
    run.decode(run.last)
    if run.choose.flag():
        run.evict(run.last)
        run.decode(run.last)
    run.drop_last()
    talk = run.open()
    run.prefill(talk, run.choose.tokens(1, 6))
    run.decode(talk)


@check
def closed_sessions_leave_nothing(run: Run) -> None:
    """Sessions that were closed leave nothing behind, however many there were."""
    leave_nothing(run)


@check
def id_used_again_after_close(run: Run) -> None:
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


@check
def bad_tokens_are_refused(run: Run) -> None:
    """Tokens that aren't in the vocabulary are a ValueError, and change nothing."""
    talk = run.open()
    if run.choose.flag():
        run.prefill(talk, run.choose.tokens(1, 6))
    size = run.choose.vocab_size
    for bad in (-1, size, size + 1, 2**31 - 1, 2**31, 2**63, -(2**31), 2**32):
        if run.choose.one_of((False, True, True, True)):
            before, after = run.choose.tokens(0, 3), run.choose.tokens(0, 3)
            run.refuse(talk, prefill([*before, bad, *after]), ValueError)
    run.prefill(talk, run.choose.tokens(1, 6))
    run.decode(talk)


@check
def empty_session_is_refused(run: Run) -> None:
    """Decoding a session without tokens is a ValueError, and changes nothing."""
    talk = run.open()
    if run.choose.flag():
        run.prefill(talk, run.choose.tokens(1, 4))
        run.rewind(talk, 0)
    run.refuse(talk, DECODE, ValueError)
    run.prefill(talk, run.choose.tokens(1, 6))
    run.decode(talk)


@check
def closed_session_is_refused(run: Run) -> None:
    """A session that was closed is refused with SessionClosedError."""
    talk, other = run.open(), run.open()
    run.prefill(other, run.choose.tokens(1, 6))
    if run.choose.flag():
        run.prefill(talk, run.choose.tokens(1, 6))
    run.close(talk)
    run.refuse(talk, DECODE, SessionClosedError)
    run.refuse(talk, prefill(run.choose.tokens(1, 6)), SessionClosedError)
    run.decode(other)


@check
def foreign_session_is_refused(run: Run) -> None:
    """A session that was begun by something else is refused with SessionOwnerError, and not changed."""
    talk, foreign = run.open(), run.open_foreign(run.choose.tokens(1, 6))
    run.prefill(talk, run.choose.tokens(1, 6))
    run.refuse(foreign, DECODE, SessionOwnerError)
    run.refuse(foreign, prefill(run.choose.tokens(1, 6)), SessionOwnerError)
    run.decode(talk)


# All together


def any_prefill(run: Run, talk: Talk, tokens: list[int], number: int) -> None:
    """Prefill."""
    if len(tokens) <= talk.room:
        run.prefill(talk, tokens)


def any_decode(run: Run, talk: Talk, tokens: list[int], number: int) -> None:
    """Decode, or be refused."""
    if not talk.history:
        run.refuse(talk, DECODE, ValueError)
    elif talk.room:
        run.decode(talk)


def any_evict(run: Run, talk: Talk, tokens: list[int], number: int) -> None:
    """Evict."""
    run.evict(talk)


def any_rewind(run: Run, talk: Talk, tokens: list[int], number: int) -> None:
    """Rewind."""
    run.rewind(talk, number % (len(talk.history) + 1))


def any_reuse(run: Run, talk: Talk, tokens: list[int], number: int) -> None:
    """Reuse a prefix."""
    kept = talk.history[: number % (len(talk.history) + 1)]
    run.reuse_prefix(talk, kept + tokens[: MOST_TOKENS - len(kept)])


def any_failure(run: Run, talk: Talk, tokens: list[int], number: int) -> None:
    """Make a step fail."""
    step = DECODE if talk.history and number % 2 else prefill(tokens)
    if talk.room >= len(tokens):
        fail_step(run, talk, step, Fault(can_fail, number, ERRORS[number % len(ERRORS)]()))


def any_bad_tokens(run: Run, talk: Talk, tokens: list[int], number: int) -> None:
    """Prefill a token outside the vocabulary."""
    run.refuse(talk, prefill([*tokens, run.choose.vocab_size + number]), ValueError)


def any_reopening(run: Run, talk: Talk, tokens: list[int], number: int) -> None:
    """Close a session, and open another with its id."""
    run.close(talk)
    run.refuse(talk, DECODE, SessionClosedError)
    run.reopen(talk)


def any_foreign(run: Run, talk: Talk, tokens: list[int], number: int) -> None:
    """Step another engine's session."""
    foreign = run.open_foreign(tokens)
    run.refuse(foreign, DECODE if number % 2 else prefill(tokens), SessionOwnerError)
    run.forget(foreign)


ANY: Final[Sequence[Callable[[Run, Talk, list[int], int], None]]] = (
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
    return event.name not in {"borrow", "end of borrow", "release", "truncate"}


@check
def any_sequence_of_calls(run: Run) -> None:
    """After any calls on some sessions, in any order, each has the same tokens as it would have alone."""
    talks = [run.open() for _ in range(run.choose.number(1, 4))]
    for kind, place, tokens, number in run.choose.sequence(len(ANY), len(talks)):
        ANY[kind](run, talks[place], tokens, number)
