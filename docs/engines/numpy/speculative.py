"""Speculative decoding: a small model guesses tokens, a large one checks them all in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from inference_session import Session
from numpy_llama import LlamaEngine, Sampler, greedy


def speculate(
    engine: LlamaEngine,
    session: Session,
    draft: LlamaEngine,
    draft_session: Session,
    *,
    guesses: int = 4,
    sample: Sampler = greedy,
) -> list[int]:
    """Add the next tokens of `session`, from 1 to `guesses` + 1, and return them.

    They are the same as from so many calls of `engine.decode`: the draft's guesses decide only how
    many there are. The draft has a session of its own, and may be any model with the same
    vocabulary.
    """
    with engine.slots.borrow(session) as state:
        length = len(state.token_history)
        room = engine.model.config.context_length - length
        if not length or room < 1:
            raise ValueError("nothing to decode from, or no room for what comes next")
        guessed = guess(draft, draft_session, state.token_history, min(guesses, room - 1), sample)

        for part in state.chunks(engine.chunk):  # None, unless a KV cache was lost or cut short.
            engine.model.forward([(state.kv_cache, np.asarray(part, np.int32))])
            state.advance(len(part))
        state.append(guessed)
        fed = np.asarray(state.pending, np.int32)  # The last token, and all guesses.
        hidden = engine.model.hidden_states([(state.kv_cache, fed)])
        state.advance(len(fed))

        tokens: list[int] = []
        logits = engine.model.logits(hidden[-len(guessed) - 1 :])
        for row, guessed_token in zip(logits, [*guessed, None], strict=True):
            tokens.append(sample(row, length + len(tokens)))
            if tokens[-1] != guessed_token:
                break
        # Right guesses stay, also in the KV cache. The last token was not a guess.
        state.rewind(length + len(tokens) - 1, pending=0)
        state.append(tokens[-1:])
    return tokens


def guess(
    draft: LlamaEngine, session: Session, history: Sequence[int], count: int, sample: Sampler
) -> list[int]:
    """Guess up to `count` tokens to follow `history`.

    The draft's session drops its last wrong guesses by itself, and takes the right tokens instead.
    """
    if count < 1 or len(history) >= draft.model.config.context_length:
        return []
    steps = draft.answer(session, lambda _: history, count, sample=sample)
    return [step.token for step in steps if step.token is not None]
