"""Draws the picture on the page of core concepts: what a session holds, call by call, in one decode step.

The states are not told to it: it steps a real session and draws what it sees. Colours are the theme's, light or dark.
"""

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Final

from attrs import frozen

from inference_session import Session
from inference_session.engine import BorrowedState, StateSlots


WIDTH: Final = 760
ROW: Final = 92
TOP: Final = 54
TOKENS_X: Final = 218
TOKEN: Final = 48
GAP: Final = 6

INK: Final = "var(--color-foreground-primary, #222)"
MUTED: Final = "var(--color-foreground-muted, #6b7280)"
CACHE: Final = "var(--color-brand-content, #2757dd)"
PENDING: Final = "#d9822b"
FAILURE: Final = "#d64550"


@frozen
class Moment:
    """What a session holds after a call."""

    call: str
    comment: str
    tokens: int
    kv_length: int
    pending: int
    savepoint: int


def moments() -> Iterator[Moment]:
    """Go through one decode step of a real session."""
    slots = StateSlots(create=list[int], length=len)
    with Session() as session:
        with slots.borrow(session) as state:
            state.append(range(5))
            _feed(state, 4)
        with slots.borrow(session) as state:

            def see(call: str, comment: str) -> Moment:
                return Moment(
                    call,
                    comment,
                    len(state.token_history),
                    state.kv_length,
                    len(state.pending),
                    session.token_count,
                )

            yield see("borrow(session)", "taken, or refused at once")
            _feed(state, 1)
            yield see("advance(1)", "the model was fed t4")
            state.append([5])
            yield see("append([t5])", "the model's answer")
            state.commit()
            yield see("commit()", "also where the block ends")


def _feed(state: BorrowedState[list[int]], count: int) -> None:
    state.kv_cache.extend(state.pending[:count])
    state.advance(count)


def draw(path: Path) -> None:
    """Write the picture."""
    seen = list(moments())
    height = TOP + ROW * len(seen) - 20
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="concepts-title" '
        'xmlns="http://www.w3.org/2000/svg" style="width: 100%; height: auto; margin: 1em 0">'
    )
    title = "Token history, KV cache and pending tokens, from borrow to commit or rollback"
    parts = [svg, f'<title id="concepts-title">{title}</title>', _arrowhead()]
    parts += _headings(seen[0])
    for number, moment in enumerate(seen):
        parts += _row(moment, TOP + ROW * number)
    parts += _rollback(len(seen))
    parts.append("</svg>")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _row(moment: Moment, top: int) -> Iterator[str]:
    middle = top + 22
    yield _text(0, middle - 3, moment.call, mono=True)
    yield _text(0, middle + 16, moment.comment, fill=MUTED, size=12.5)
    for position in range(moment.tokens):
        yield from _token(position, top, covered=position < moment.kv_length)
    covered = _x(moment.kv_length) - GAP - TOKENS_X
    yield f'<rect x="{TOKENS_X}" y="{top + 42}" width="{covered}" height="7" rx="3.5" fill="{CACHE}"/>'
    edge = _x(moment.savepoint) - GAP / 2
    yield (
        f'<path d="M{edge} {top - 7} V{top + 52}" stroke="{INK}" stroke-width="1.5" '
        'stroke-dasharray="2 3"/>'
    )
    yield _text(_x(6) + 10, middle - 3, f"kv_length {moment.kv_length}", mono=True, fill=CACHE)
    names = " ".join(f"t{n}" for n in range(moment.kv_length, moment.tokens)) or "none"
    yield _text(_x(6) + 10, middle + 16, f"pending {names}", mono=True, fill=PENDING)


def _token(position: int, top: int, *, covered: bool) -> Iterator[str]:
    look = (
        f'fill="{CACHE}" fill-opacity="0.14" stroke="{CACHE}"'
        if covered
        else f'fill="{PENDING}" fill-opacity="0.10" stroke="{PENDING}" stroke-dasharray="4 3"'
    )
    yield (
        f'<rect x="{_x(position)}" y="{top}" width="{TOKEN}" height="36" rx="6" '
        f'stroke-width="1.5" {look}/>'
    )
    yield _text(_x(position) + TOKEN / 2, top + 23, f"t{position}", mono=True, anchor="middle")


def _headings(first: Moment) -> Iterator[str]:
    yield _text(TOKENS_X, 16, "token_history", mono=True, weight=600)
    end = _x(first.savepoint) - GAP / 2
    yield _text(end, 34, "savepoint", anchor="middle", fill=MUTED, size=12.5)
    yield _text(TOKENS_X, TOP + 66, "KV cache", fill=CACHE, size=12.5)


def _rollback(rows: int) -> Iterator[str]:
    x, top, bottom = WIDTH - 58, TOP + 18, TOP + ROW * (rows - 1) - 20
    yield (
        f'<path d="M{x - 14} {bottom} C{x + 26} {bottom} {x + 26} {bottom} {x + 26} {bottom - 34} '
        f'V{top + 34} C{x + 26} {top} {x + 26} {top} {x - 10} {top}" fill="none" stroke="{FAILURE}" '
        'stroke-width="1.8" marker-end="url(#arrowhead)"/>'
    )
    middle = (top + bottom) / 2
    yield (
        f'<text transform="translate({x + 44} {middle}) rotate(90)" text-anchor="middle" '
        f'font-size="12.5" fill="{FAILURE}">any exception: rollback</text>'
    )


def _arrowhead() -> str:
    return (
        '<defs><marker id="arrowhead" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="{FAILURE}"/></marker></defs>'
    )


def _text(
    x: float,
    y: float,
    text: str,
    *,
    fill: str = INK,
    size: float = 14,
    weight: int = 400,
    mono: bool = False,
    anchor: str = "start",
) -> str:
    family = "var(--font-stack--monospace, monospace)" if mono else "inherit"
    return (
        f'<text x="{x}" y="{y}" fill="{fill}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}" style="font-family: {family}">{escape(text)}</text>'
    )


def _x(position: int) -> int:
    return TOKENS_X + position * (TOKEN + GAP)
