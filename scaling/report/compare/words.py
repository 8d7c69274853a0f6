"""Write numbers and spreads as people read them. Torch-free."""

from __future__ import annotations

import math

from isobatch.scaling.tuning.spread import Spread


def number(value: float) -> str:
    """Return ``value`` with four significant digits, and with commas from 1,000 on.

    >>> number(0.98765), number(12345.6), number(0.00001234), number(-0.5)
    ('0.9877', '12,350', '1.234e-05', '−0.5')
    """
    digits = 3 - math.floor(math.log10(abs(value))) if value else 0
    text = f"{value:.4g}" if value and not 1e-4 <= abs(value) < 1e15 else f"{round(value, digits):,.{max(0, digits)}f}"
    text = text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text
    return text.replace("-", "−", 1) if value < 0 else text


def spread(value: Spread) -> str:
    """Return a mean with its standard deviation, in the digits that the deviation supports.

    >>> spread(Spread(0.97312, 0.00213, 3)), spread(Spread(12345.6, 210.0, 3)), spread(Spread(0.5, None, 1))
    ('0.9731 ± 0.0021', '12,350 ± 210', '0.5')
    """
    if not value.deviation:
        return number(value.mean) if value.deviation is None else f"{number(value.mean)} ± 0"
    mean, deviation = in_digits_of(value.deviation, value.mean, value.deviation)
    return f"{mean} ± {deviation}"


def in_digits_of(size: float, *values: float) -> tuple[str, str]:
    """Return the first value, and ``a to b`` of the other two, with two significant digits of ``size``.

    >>> in_digits_of(0.0123, 0.1, 0.0877, 0.1123)
    ('0.100', '0.088 to 0.112')
    """
    digits = 1 - math.floor(math.log10(size)) if size else 3
    texts = [f"{round(value, digits) + 0.0:,.{max(0, min(digits, 9))}f}".replace("-", "−") for value in values]
    return texts[0], " to ".join(texts[1:])


def duration(seconds: float | Spread) -> str:
    """Return seconds, or their mean and spread, as ``12.3 s``, ``4.5 min`` or ``6.7 h``.

    >>> duration(12.34), duration(270), duration(24120), duration(Spread(270, 30, 3))
    ('12.3 s', '4.5 min', '6.7 h', '4.50 ± 0.50 min')
    """
    time = seconds if isinstance(seconds, Spread) else Spread(seconds, None, 1)
    unit, size = next((pair for pair in (("h", 3600), ("min", 60)) if time.mean >= 2 * pair[1]), ("s", 1))
    scaled = Spread(time.mean / size, time.deviation and time.deviation / size, time.n)
    return f"{spread(scaled) if scaled.deviation else f'{scaled.mean:.3g}'} {unit}"


def listed(names: list[str], most: int = 4) -> str:
    """Return names as ``a, b and c``, the first few of many."""
    if len(names) > most:
        return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
