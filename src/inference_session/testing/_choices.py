"""The choices of a check: numbers and tokens, drawn by Hypothesis, which shrinks them when a promise is broken."""

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Final, TypeVar

from attrs import frozen
from hypothesis import strategies as st


T = TypeVar("T")

MELODIES: Final = 32
"""How many different sequences of tokens there are, apart from their length."""

EDGES: Final = 0.1
"""The share of tokens taken from both ends of the vocabulary."""


@cache
def numbers(options: int) -> st.SearchStrategy[int]:
    """Return a strategy for numbers from 0 to `options` - 1.

    They are made of bits, because Hypothesis mixes constants from the project's modules into its own numbers, and the
    seed alone would no longer determine the examples.
    """
    bits = st.tuples(*[st.booleans()] * (options - 1).bit_length())
    return bits.map(lambda drawn: int("".join("01"[bit] for bit in (False, *drawn)), 2) % options)


@frozen
class Choices:
    """The choices of one example."""

    data: st.DataObject
    vocab_size: int

    def number(self, low: int, high: int) -> int:
        """Choose a number from `low` to `high`."""
        return low + self.data.draw(numbers(high - low + 1)) if high > low else low

    def one_of(self, options: Sequence[T]) -> T:
        """Choose one of the options, given the simplest first."""
        return options[self.number(0, len(options) - 1)]

    def flag(self) -> bool:
        """Choose yes or no."""
        return self.data.draw(st.booleans())

    def tokens(self, low: int, high: int) -> list[int]:
        """Choose from `low` to `high` tokens."""
        beyond, which = divmod(self.number(0, (high - low + 1) * MELODIES - 1), MELODIES)
        return melody(which, low + beyond, self.vocab_size)

    def sequence(self, kinds: int, sessions: int) -> list[tuple[int, int, list[int], int]]:
        """Choose a sequence of calls, each with a kind, a session, tokens and a number."""
        calls = st.tuples(
            numbers(kinds), numbers(sessions), numbers(MELODIES), numbers(8), numbers(16)
        )
        return [
            (kind, session, melody(which, length + 1, self.vocab_size), number)
            for _ in range(3)  # a single list is short, most of the time
            for kind, session, which, length, number in self.data.draw(st.lists(calls, max_size=8))
        ]


def melody(which: int, length: int, vocab_size: int) -> list[int]:
    """Return pseudo-random tokens, with more of the first and last ids; longer ones begin as shorter ones do."""
    random = Random(f"{which}")  # noqa: S311 not for secrets
    return [
        random.choice((0, vocab_size - 1))
        if random.random() < EDGES
        else random.randrange(vocab_size)
        for _ in range(length)
    ]
