"""Numbers as people read them."""


def short(count: float) -> str:
    """Write a count as briefly as it can be."""
    for unit, name in ((1_000_000, "M"), (1000, "k")):
        if count >= unit:
            return f"{count / unit:g}{name}"
    return f"{count:g}"


def seconds(value: float) -> str:
    """Write seconds in a unit that suits them."""
    for unit, name in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= unit:
            return f"{value / unit:g} {name}"
    return f"{value / 1e-9:g} ns"


def duration(value: float) -> str:
    """Write seconds, to two or three digits."""
    digits = float(f"{value:.2g}") if value > 0 else 0
    return seconds(digits) if digits >= 1e-9 else f"{value / 1e-9:.2f} ns"


def megabytes(value: float) -> str:
    """Write bytes."""
    return f"{value / 2**20:,.0f} MiB"


def times(ratio: float) -> str:
    """Write how many times one thing is another."""
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"


def percent(share: float) -> str:
    """Write a share."""
    return f"{100 * share:.2g} %"
