"""What every layout is made of. A layout is a way in which people write rows; reading a row gives a canonical one (formats.py)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field

from harness.errors import DataError


class LeftOut(DataError):
    """A row that is whole, and that the layout itself says is not to be imitated (labelled bad, say): listed, and no fault of the data."""


@dataclass(frozen=True)
class Settings:
    """What a layout leaves open. Draws depend on the row's content and `seed`, not on its place."""

    without_gold: float = 0.0
    """Share of retrieval rows that lose their gold passages."""
    distractors: int | None = None
    """So many other passages stand in a retrieval row, or other tools in a Seal-Tools row. None: all that the row has; of tools four."""
    seed: int = 42


@dataclass
class Reading:
    """How rows are read, and what of the current one is lost by it.

    `lost` None: nobody asks (a recipe), so nothing is looked for.
    """

    settings: Settings = field(default_factory=Settings)
    lost: list[str] | None = None
    asks: bool = False
    """Rows are questions; an answer may be missing."""

    @property
    def counts_losses(self) -> bool:
        return self.lost is not None

    def lose(self, what: str) -> None:
        if self.lost is not None:
            self.lost.append(what)

    def draw(self, purpose: str, content: object) -> float:
        """A number from 0 to 1 that belongs to this content and purpose."""
        text = json.dumps([purpose, self.settings.seed, content], sort_keys=True, ensure_ascii=False)
        return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:7], "big") / 2**56


@dataclass(frozen=True)
class Layout:
    keys: tuple[frozenset[str], ...]
    """The sets of keys that show it; one of them is enough."""
    shown: str
    """What to tell a person."""
    read: Callable[[dict, Reading], dict]
    uses: frozenset[str] = frozenset()
    """Keys that are read beside those that show it; any other key of a row is lost."""
    fits: Callable[[dict], bool] | None = None
    """Looks at values, where keys do not say enough."""
    instead_of: tuple[str, ...] = ()
    """More general layouts, which a row that fits this one is not."""

    def is_shown_by(self, row: dict) -> bool:
        return any(known <= row.keys() for known in self.keys) and (self.fits is None or self.fits(row))

    def lose_other_keys(self, row: dict, reading: Reading) -> None:
        if reading.counts_losses:
            shown = [known for known in self.keys if known <= row.keys()]
            for key in row.keys() - self.uses.union(*shown):
                if row[key] is not None:
                    reading.lose(f"`{key}` of the row")


def key_set(names: str) -> frozenset[str]:
    return frozenset(names.split())
