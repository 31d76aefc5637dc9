"""The plots of the page, each for a light and for a dark background, the same to the byte for the same results."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false

import io
from collections.abc import Callable, Iterable, Sequence
from math import inf, log10
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from tests.benchmarks.comparison.records import Record
from tests.benchmarks.comparison.units import seconds, short


TEXT = {"light": "#333333", "dark": "#dddddd"}
QUIET = {"light": "#808080", "dark": "#999999"}
COLOURS = {  # blue is a session's; told apart by the colour-blind, too
    "light": {"session": "#0063a6", "first": "#c04e00", "second": "#007a5a", "third": "#7a5195"},
    "dark": {"session": "#5cb8f0", "first": "#f0a050", "second": "#45c9a0", "third": "#c9a0e8"},
}
STYLE: Any = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "svg.fonttype": "none",
    "svg.hashsalt": "inference-session",
}


WIDTH = 4.8
"""In inches: on a phone, whose screen is a little narrower, the type stays legible."""

Colours = dict[str, str]
End = tuple[float, float, str]
"""A line's last point, and its colour."""
Ends = dict[str, End]
"""By what the lines are."""


def draw(name: str, records: Sequence[Record]) -> dict[str, str]:
    """Return a measurement's plot as SVG, by the kind of background."""
    return {mode: to_svg(figure(name, records, mode)) for mode in COLOURS}


def figure(name: str, records: Sequence[Record], mode: str) -> Figure:
    """Return a measurement's plot."""
    text, quiet = TEXT[mode], QUIET[mode]
    colours = dict.fromkeys(
        ("axes.labelcolor", "axes.titlecolor", "text.color", "xtick.labelcolor"), text
    )
    colours |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), quiet)
    style: Any = {**STYLE, **colours, "ytick.labelcolor": text}
    with mpl.rc_context(style):
        return DRAWN_BY[name](records, {**COLOURS[mode], "quiet": quiet})


def to_svg(figure: Figure) -> str:
    """Return a figure as text that depends on nothing but what it shows."""
    file = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())


def bookkeeping(records: Sequence[Record], colours: Colours) -> Figure:
    """Draw shares of a step as dots in a row for each engine."""
    figure = Figure((WIDTH, 0.6 + 0.42 * len(records)))
    axes = figure.subplots()
    for row, record in enumerate(records):
        shares = {
            "engine": 100 * record["engine_seconds"] / record["step_seconds"],
            "session": 100 * record["session_seconds"] / record["step_seconds"],
        }
        axes.plot(list(shares.values()), [row, row], color=colours["quiet"], linewidth=1, zorder=1)
        axes.plot(shares["engine"], row, "o", color=colours["first"], markersize=6)
        axes.plot(shares["session"], row, "o", color=colours["session"], markersize=7)
        labels = {name: f"{share:.2g} %" for name, share in shares.items()}
        if row == 0:
            labels["session"] = f"session {labels['session']}"
            labels["engine"] += " engine"
        low, high = sorted(shares, key=shares.__getitem__)
        for name, shift in ((low, -8), (high, 8)):
            colour = colours["session" if name == "session" else "first"]
            beside(axes, labels[name], (shares[name], row), shift, colour)
    axes.set_yticks(range(len(records)), [f"{r['engine']},\n{r['model']}" for r in records])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(0.003, 100)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("added to a decode step")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure


def prefix(records: Sequence[Record], colours: Colours) -> Figure:
    """Draw a panel for each place of the first token that differs."""
    figure = Figure((WIDTH, 6.0))
    places = {
        "start": "differs after 8 tokens",
        "middle": "differs half-way",
        "end": "differs 8 before the end",
    }
    panels = figure.subplots(len(places), sharex=True, sharey=True)
    lines = {
        ("mlx-lm", "list"): ("mlx-lm", colours["second"], "-"),
        ("llama-cpp-python", "list"): ("llama-cpp-python", colours["first"], "-"),
        ("session", "list"): ("session, list", colours["session"], "--"),
        ("session", "NumPy"): ("session, NumPy", colours["session"], "-"),
    }
    ends: Ends = {}
    for axes, (place, title) in zip(panels, places.items(), strict=True):
        axes.set_title(title)
        for (subject, kind), (label, colour, style) in lines.items():
            points = [
                (r["length"], r["seconds"])
                for r in records
                if (r["subject"], r["kind"], r["place"]) == (subject, kind, place)
            ]
            last = line(axes, points, colour, style)
            if place == "end":
                ends[label] = last
        scale(axes, "tokens" if place == "end" else "")
    label_ends(panels[-1], ends)
    figure.supylabel("time to find and keep what is cached", fontsize=9)
    return figure


def growth(records: Sequence[Record], colours: Colours) -> Figure:
    """Draw a panel for each thing that grows."""
    figure = Figure((WIDTH, 6.0))
    panels = figure.subplots(2, sharey=True)
    calls = {
        "reuse_prefix": colours["first"],
        "rewind": colours["third"],
        "borrow": colours["session"],
        "advance": colours["second"],
        "append": colours["quiet"],
        "step": colours["session"],
        "by hand": colours["quiet"],
    }
    shown = {"tokens": [*calls][:5], "sessions": ["reuse_prefix", "rewind", "step", "by hand"]}
    titles = {
        "tokens": "calls, by tokens in the history",
        "sessions": "a borrow with a call, by sessions",
    }
    names = {"step": "decode step", "by hand": "step by hand"}
    ends: dict[str, Ends] = {"tokens": {}, "sessions": {}}
    for axes, by in zip(panels, ends, strict=True):
        axes.set_title(titles[by])
        for call in shown[by]:
            points = [
                (r["count"], r["seconds"]) for r in records if (r["by"], r["call"]) == (by, call)
            ]
            ends[by][names.get(call, call)] = line(axes, points, calls[call], "-")
        scale(axes, by)
    for axes, by in zip(panels, ends, strict=True):
        label_ends(axes, ends[by])
    return figure


def memory(records: Sequence[Record], colours: Colours) -> Figure:
    """Draw a bar for each library and way, for the longest history."""
    longest = max(record["tokens"] for record in records)
    rows = [record for record in records if record["tokens"] == longest]
    figure = Figure((WIDTH, 0.7 + 0.34 * len(rows)))
    axes = figure.subplots()
    names = {
        "deepcopy": "copy.deepcopy",
        "session": "session",
        "bare cache": "bare cache, unprotected",
    }
    colour_of = {"deepcopy": "first", "session": "session", "bare cache": "quiet"}
    for row, record in enumerate(rows):
        place = row + 0.6 * (row // len(names))
        width = record["peak_bytes"] / record["cache_bytes"]
        axes.barh(place, width, color=colours[colour_of[record["way"]]], height=0.7)
        axes.text(width + 0.01, place, f"{names[record['way']]}, {width:.2f}", va="center")
        if record["way"] == "session":
            axes.text(-0.02, place, record["peer"], va="center", ha="right")
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlim(0, 2.1)
    axes.set_xticks([0, 0.5, 1])
    axes.set_xlabel(f"most memory taken to go on, in KV caches of {longest:,} tokens")
    return figure


def recovery(records: Sequence[Record], colours: Colours) -> Figure:
    """Draw a panel for each engine."""
    engines = list(dict.fromkeys(record["engine"] for record in records))
    figure = Figure((WIDTH, 2.2 * len(engines)))
    panels = figure.subplots(len(engines), sharex=True, sharey=True)
    ways = {True: ("with truncate", colours["session"]), False: ("without", colours["first"])}
    for axes, engine in zip(panels, engines, strict=True):
        axes.set_title(engine)
        ends: Ends = {}
        for truncate, (label, colour) in ways.items():
            points = [
                (r["tokens"], r["recovery_seconds"] / r["step_seconds"])
                for r in records
                if (r["engine"], r["truncate"]) == (engine, truncate)
            ]
            ends[label] = line(axes, points, colour, "-")
        scale(axes, "tokens in the history" if engine == engines[-1] else "")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylim(bottom=0.5)
        label_ends(axes, ends)
    figure.supylabel("time from the failure to the next right token, in steps", fontsize=9)
    return figure


DRAWN_BY: dict[str, Callable[[Sequence[Record], Colours], Figure]] = {
    "bookkeeping": bookkeeping,
    "prefix": prefix,
    "growth": growth,
    "memory": memory,
    "recovery": recovery,
}


def line(axes: Axes, points: Iterable[tuple[float, float]], colour: str, style: str) -> End:
    """Draw a line with its points, and return its end."""
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, style, marker="o", color=colour)
    return xs[-1], ys[-1], colour


def label_ends(axes: Axes, ends: Ends) -> None:
    """Write at the lines' ends what they are, one above the other where they would meet."""
    low, high = (log10(limit) for limit in axes.get_ylim())
    height = axes.bbox.height * 72 / mpl.rcParams["figure.dpi"]  # in points of type
    above = -inf
    for label, (x, y, colour) in sorted(ends.items(), key=lambda end: end[1][1]):
        place = height * (log10(y) - low) / (high - low)
        above = max(place, above + 1.2 * STYLE["font.size"])
        beside(axes, label, (x, y), 6, colour, above - place)


def beside(  # noqa: PLR0917
    axes: Axes, label: str, point: tuple[float, float], right: float, colour: str, up: float = 0
) -> None:
    """Write so many points of type to the right of something, or to the left if that is negative."""
    axes.annotate(
        label,
        point,
        xytext=(right, up),
        textcoords="offset points",
        ha="left" if right > 0 else "right",
        va="center",
        color=colour,
        annotation_clip=False,
    )


def scale(axes: Axes, what: str) -> None:
    """Have both axes logarithmic, in units that can be read."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(what)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(numticks=12))
    axes.grid(visible=True, axis="y", linewidth=0.4, alpha=0.5)
