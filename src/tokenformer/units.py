"""Numbers as people read them: in few columns, three digits and a unit; in sentences, one thing or several."""

from __future__ import annotations


def short(number: float) -> str:
    """Three digits and a unit: 1.31 B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def scientific(number: float) -> str:
    """Three digits and a power of ten: 1.43e22."""
    return f"{number:.2e}".replace("e+", "e")


def amount(number: float) -> str:
    """Three digits, or whole: 9.44, 5,706; with a unit from a million on."""
    return short(number) if number >= 999_999.5 else f"{number:,.0f}" if number >= 99.5 else f"{number:.3g}"


def looped(loops: int) -> str:
    """Say behind a number of blocks how often they run, where that is more than once: ", run 2 times"."""
    return f", run {loops} times" if loops > 1 else ""


def counted(number: int, thing: str) -> str:
    """Write a number of things, whose plural ends in s: 1 block, 1,000 blocks."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
