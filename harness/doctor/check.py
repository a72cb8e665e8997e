"""What one check has found, and how a person reads it: grouped, aligned, its remedy below it."""

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    area: str
    name: str
    level: Level
    what: str
    remedy: str = ""


INDENT, LEVEL_WIDTH, NAME_WIDTH = 2, 4, 12


def render_area(
    area: str, checks: Iterable[Check], *, width: int | None, style: Callable[[str, str], str] = lambda text, kind: text
) -> str:
    """The area's name, then a line for each check: `  warn  compiler     …`. Text that is wider than `width` goes on below itself; None:
    nothing is broken. style(text, kind) colours a part; its kinds are area, remedy and the levels."""
    column = INDENT + LEVEL_WIDTH + 2 + NAME_WIDTH + 2
    lines = [style(area, "area")]
    for check in checks:
        what = _wrap(check.what, width, column)
        head = f"{'':{INDENT}}{style(f'{check.level:<{LEVEL_WIDTH}}', check.level)}  {check.name:<{NAME_WIDTH}}  "
        lines.append(head + what[0])
        lines += [" " * column + line for line in what[1:]]
        if check.remedy and check.level != "ok":
            lines += [" " * column + style(line, "remedy") for line in _wrap(f"→ {check.remedy}", width, column, hanging="  ")]
    return "\n".join(lines)


def _wrap(text: str, width: int | None, column: int, hanging: str = "") -> list[str]:
    if width is None:
        return [text]
    return textwrap.wrap(text, max(width - column, 30), subsequent_indent=hanging, break_on_hyphens=False) or [""]
