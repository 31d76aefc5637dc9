"""The strength of an engine: a mistake shows only if some output depends on it."""

from collections.abc import Callable, Sequence
from typing import Final

from inference_session import Session
from inference_session._session import NO_CACHE
from inference_session.engine import Engine
from inference_session.testing._choices import melody


TRIALS: Final = 16
LENGTH: Final = 8
ENOUGH: Final = 0.125
"""The share of trials in which a change of the input, or of the KV cache, must change the output."""


def weakness(make_engine: Callable[[], Engine], vocab_size: int) -> str | None:
    """Return why an engine is too weak to check, if it is."""
    engine = make_engine()
    prompts = [melody(-1 - trial, LENGTH, vocab_size) for trial in range(TRIALS)]
    answers = [answer(engine, prompt) for prompt in prompts]
    if len(set(answers)) == 1:
        return "it answers every prompt with the same token"
    for part, change in CHANGES.items():
        changed = [answer(engine, change(prompt, vocab_size)) for prompt in prompts]
        if share_of_differences(answers, changed) < ENOUGH:
            return f"its answers hardly depend on {part}"
    if share_of_differences(*answers_with_swapped_caches(engine, prompts)) < ENOUGH:
        return "its answers hardly depend on the KV cache that the session holds"
    return None


def last_changed(prompt: Sequence[int], vocab_size: int) -> list[int]:
    """Return a prompt with another last token."""
    return [*prompt[:-1], another(prompt[-1], vocab_size)]


def first_changed(prompt: Sequence[int], vocab_size: int) -> list[int]:
    """Return a prompt with another first token."""
    return [another(prompt[0], vocab_size), *prompt[1:]]


def another(token: int, vocab_size: int) -> int:
    """Return another token."""
    return (token + (vocab_size + 1) // 2) % vocab_size


def reordered(prompt: Sequence[int], vocab_size: int) -> list[int]:
    """Return a prompt with its tokens, all but the last, in another order."""
    return [*reversed(prompt[:-1]), prompt[-1]]


CHANGES: Final[dict[str, Callable[[Sequence[int], int], list[int]]]] = {
    "the last token of the prompt": last_changed,
    "the first token of the prompt": first_changed,
    "the order of the tokens": reordered,
}


def answer(engine: Engine, prompt: Sequence[int]) -> int:
    """Return the first token decoded after a prompt."""
    with Session() as session:
        engine.prefill(session, list(prompt))
        return engine.decode(session).token


def answers_with_swapped_caches(
    engine: Engine, prompts: Sequence[Sequence[int]]
) -> tuple[list[int], list[int]]:
    """Return the second tokens decoded after prompts, without and with the KV caches of two sessions swapped."""
    right: list[int] = []
    wrong: list[int] = []
    for pair in zip(prompts[::2], prompts[1::2], strict=True):
        for swapped, answers in ((False, right), (True, wrong)):
            with Session() as one, Session() as other:
                for session, prompt in zip((one, other), pair, strict=True):
                    engine.prefill(session, list(prompt))
                    engine.decode(session)
                if swapped:
                    swap_caches(one, other)
                answers += [decoded(engine, one), decoded(engine, other)]
    return right, wrong


def decoded(engine: Engine, session: Session) -> int:
    """Return the next token; -1 if the engine notices the change."""
    try:
        return engine.decode(session).token
    except Exception:  # noqa: BLE001 so it depends on the KV cache
        return -1


def swap_caches(one: Session, other: Session) -> None:
    """Give each of two sessions the KV cache of the other, if they have one."""
    if one._kv_cache is not NO_CACHE and other._kv_cache is not NO_CACHE:
        one._kv_cache, other._kv_cache = other._kv_cache, one._kv_cache


def share_of_differences(some: Sequence[int], others: Sequence[int]) -> float:
    """Return how often two answers differ."""
    return sum(left != right for left, right in zip(some, others, strict=True)) / len(some)
