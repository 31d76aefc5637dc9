"""The choices of a check: numbers and tokens, drawn by Hypothesis, which shrinks them when a promise is broken."""

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Final, TypeVar

from attrs import frozen
from hypothesis import strategies as st


T = TypeVar("T")

TEXTS: Final = 8
"""How many different sequences of tokens there are, apart from their length."""

EDGES: Final = 0.1
"""The share of tokens taken from both ends of the vocabulary."""

FEW: Final = 8
"""How many tokens a short prompt has at most."""

POWERS: Final = [2**exponent for exponent in range(3, 13)]
"""Around their multiples, prompts end more often than elsewhere."""


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
    max_tokens: int

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
        return self.text(self.number(low, high))

    def prompt(self, low: int, reserve: int) -> list[int]:
        """Choose a prompt that leaves room for `reserve` more tokens.

        Half of them are short. The others are about as long as a multiple of a power of two, where blocks and windows
        end, or as long as possible.
        """
        most = self.max_tokens - reserve
        kind = self.one_of(("short", "short", "short", "around", "around", "longest"))
        if kind == "short":
            length = self.number(low, FEW)
        elif kind == "longest":
            length = most - self.number(0, 3)
        else:
            power = self.one_of([power for power in POWERS if power <= most])
            length = power * self.number(1, most // power) + self.number(-2, 1)
        return self.text(min(max(length, low), most))

    def text(self, length: int, texts: int = TEXTS) -> list[int]:
        """Choose one of some sequences of so many tokens."""
        return text(self.number(0, texts - 1), length, self.vocab_size)

    def sequence(self, *options: int) -> list[tuple[int, ...]]:
        """Choose a sequence of calls, each described by numbers below these."""
        calls = st.tuples(*map(numbers, options))
        # Three lists, as a single one is short, most of the time.
        return [
            call
            for _ in range(3)
            for call in self.data.draw(st.lists(calls, min_size=1, max_size=8))
        ]


@cache
def _text(which: int, length: int, vocab_size: int) -> tuple[int, ...]:
    random = Random(f"{which}")  # noqa: S311 not for secrets
    return tuple(
        random.choice((0, vocab_size - 1))
        if random.random() < EDGES
        else random.randrange(vocab_size)
        for _ in range(length)
    )


def text(which: int, length: int, vocab_size: int) -> list[int]:
    """Return pseudo-random tokens, with more of the first and last ids; longer ones begin as shorter ones do."""
    return list(_text(which, length, vocab_size))
