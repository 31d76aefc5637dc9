"""Draws the picture on the page of core concepts: the state of a session, call by call, in one decode step.

No state is made up: it steps a real session and draws the result. Colours are the theme's, light or dark.
There are two layouts; the site's style shows the one that fits the screen.
"""

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Final

from attrs import frozen

from inference_session import Session
from inference_session.engine import BorrowedState, StateSlots


GAP: Final = 6

INK: Final = "var(--color-foreground-primary, #222)"
MUTED: Final = "var(--color-foreground-muted, #6b7280)"
CACHE: Final = "var(--color-brand-content, #2757dd)"
PENDING: Final = "#d9822b"
FAILURE: Final = "#d64550"


@frozen
class Moment:
    """The state of a session after a call."""

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


@frozen
class Layout:
    """Where things are, in pixels, from a moment's top left corner on if they belong to one."""

    name: str
    width: int
    top: int
    """Where the first moment is."""
    row: int
    """From one moment to the next."""
    tokens_x: int
    token: int
    """The width of a token."""
    comment: tuple[int, int]
    numbers: tuple[tuple[int, int], tuple[int, int]]
    heading: int
    arrow_x: int

    def x(self, position: int) -> int:
        """Return where a token begins."""
        return self.tokens_x + position * (self.token + GAP)


WIDE: Final = Layout(
    name="wide",
    width=760,
    top=54,
    row=92,
    tokens_x=218,
    token=48,
    comment=(0, 38),
    numbers=((552, 19), (552, 38)),
    heading=16,
    arrow_x=688,
)
NARROW: Final = Layout(
    name="narrow",
    width=360,
    top=84,
    row=138,
    tokens_x=0,
    token=44,
    comment=(130, -20),
    numbers=((0, 68), (110, 68)),
    heading=14,
    arrow_x=306,
)


def draw(path: Path) -> None:
    """Write the picture, in both layouts."""
    seen = list(moments())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*_svg(seen, WIDE), *_svg(seen, NARROW), ""]), encoding="utf-8")


def _svg(seen: list[Moment], layout: Layout) -> Iterator[str]:
    height = layout.top + layout.row * len(seen) - 20
    title = "Token history, KV cache and pending tokens, from borrow to commit or rollback"
    yield (
        f'<svg class="only-{layout.name}" viewBox="0 0 {layout.width} {height}" role="img" '
        f'aria-labelledby="concepts-{layout.name}" xmlns="http://www.w3.org/2000/svg" '
        'style="width: 100%; height: auto; margin: 1em 0">'
    )
    yield f'<title id="concepts-{layout.name}">{title}</title>'
    yield _arrowhead(layout)
    yield from _headings(seen[0], layout)
    for number, moment in enumerate(seen):
        yield from _row(moment, layout.top + layout.row * number, layout)
    yield from _rollback(len(seen), layout)
    yield "</svg>"


def _row(moment: Moment, top: int, layout: Layout) -> Iterator[str]:
    x, y = layout.comment
    yield _text(0, top + (y if x else y - 19), moment.call, mono=True)
    yield _text(x, top + y, moment.comment, fill=MUTED, size=12.5)
    for position in range(moment.tokens):
        yield from _token(position, top, layout, covered=position < moment.kv_length)
    covered = layout.x(moment.kv_length) - GAP - layout.tokens_x
    yield (
        f'<rect x="{layout.tokens_x}" y="{top + 42}" width="{covered}" height="7" rx="3.5" '
        f'fill="{CACHE}"/>'
    )
    edge = layout.x(moment.savepoint) - GAP / 2
    yield (
        f'<path d="M{edge} {top - 7} V{top + 52}" stroke="{INK}" stroke-width="1.5" '
        'stroke-dasharray="2 3"/>'
    )
    (x, y), below = layout.numbers
    yield _text(x, top + y, f"kv_length {moment.kv_length}", mono=True, fill=CACHE)
    names = " ".join(f"t{n}" for n in range(moment.kv_length, moment.tokens)) or "none"
    yield _text(below[0], top + below[1], f"pending {names}", mono=True, fill=PENDING)


def _token(position: int, top: int, layout: Layout, *, covered: bool) -> Iterator[str]:
    look = (
        f'fill="{CACHE}" fill-opacity="0.14" stroke="{CACHE}"'
        if covered
        else f'fill="{PENDING}" fill-opacity="0.10" stroke="{PENDING}" stroke-dasharray="4 3"'
    )
    x = layout.x(position)
    yield (
        f'<rect x="{x + 1}" y="{top}" width="{layout.token - 2}" height="36" rx="6" '
        f'stroke-width="1.5" {look}/>'
    )
    yield _text(x + layout.token / 2, top + 23, f"t{position}", mono=True, anchor="middle")


def _headings(first: Moment, layout: Layout) -> Iterator[str]:
    yield _text(layout.tokens_x, layout.heading, "token_history", mono=True, weight=600)
    end = layout.x(first.savepoint) - GAP / 2
    yield _text(end, layout.heading + 18, "savepoint", anchor="middle", fill=MUTED, size=12.5)
    if layout is WIDE:
        yield _text(layout.tokens_x, layout.top + 66, "KV cache", fill=CACHE, size=12.5)


def _rollback(rows: int, layout: Layout) -> Iterator[str]:
    x = layout.arrow_x
    top, bottom = layout.top + 18, layout.top + layout.row * (rows - 1) + 18
    yield (
        f'<path d="M{x} {bottom} C{x + 30} {bottom} {x + 30} {bottom} {x + 30} {bottom - 34} '
        f'V{top + 34} C{x + 30} {top} {x + 30} {top} {x} {top}" fill="none" stroke="{FAILURE}" '
        f'stroke-width="1.8" marker-end="url(#arrowhead-{layout.name})"/>'
    )
    middle = (top + bottom) / 2
    yield (
        f'<text transform="translate({x + 40} {middle}) rotate(90)" text-anchor="middle" '
        f'font-size="12.5" fill="{FAILURE}">any exception: rollback</text>'
    )


def _arrowhead(layout: Layout) -> str:
    return (
        f'<defs><marker id="arrowhead-{layout.name}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" '
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
