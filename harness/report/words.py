"""Numbers, durations and moments for people."""

import math
import time

from harness.report.lives import Life

UNITS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))


def duration(seconds: float) -> str:
    """`3 d 4 h`, `4 h 12 min`, `12 min 4 s`, `41 s`, `0.06 s`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 or not seconds else f"{seconds:.1f} s" if seconds >= 0.95 else f"{seconds:.2g} s"
    seconds = round(seconds)
    for length, unit, part, unit_of_part in UNITS:
        if seconds >= length:
            whole, rest = divmod(round(seconds / part), length // part)
            return f"{whole} {unit}" + (f" {rest} {unit_of_part}" if rest else "")
    raise AssertionError(seconds)


def number(value: float, digits: int = 4) -> str:
    """With so many digits that count: 0.8732, 18,204, 2.0e-4."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if value == int(value) and size < 1e7:
        return f"{value:,.0f}"
    if size >= 1e7 or size < 1e-3:
        mantissa, _, exponent = f"{value:.{max(1, digits - 2)}e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    places = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{value:,.{places}f}"


def percent(share: float) -> str:
    """91 %, 99.6 %, never 100 % of what is less."""
    if 0.995 <= share < 1 or 0 < share < 0.01:
        return f"{math.floor(share * 1000) / 10:.1f} %"
    return f"{share * 100:.0f} %"


def counted(count: int, name: str, plural: str | None = None) -> str:
    return f"{count:,} {name if count == 1 else plural or name + 's'}"


def listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def moment(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s))


ENDS = {
    "preempted": ("preemption", None),
    "time limit": ("time limit", None),
    "killed": ("death", None),
    "hung": ("hang", None),
    "rolled back": ("rollback", None),
    "failed": ("failure", None),
    "stopped": ("stop", None),
}


def interruptions(lives: list[Life]) -> str:
    """`2 preemptions and 1 death`, of all lives but the last."""
    ends = [life.ended for life in lives[:-1]]
    return listed([counted(ends.count(end), *names) for end, names in ENDS.items() if end in ends])
