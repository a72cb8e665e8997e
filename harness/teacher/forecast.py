"""What a capture will cost, said before it is paid: tokens, disk and the teacher's hours, and when the cache has paid for itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from harness.teacher.format import RECORD, Settings

MIB = 2**20


@dataclass(frozen=True)
class Done:
    """What a round of units took."""

    tokens: int = 0
    positions: int = 0
    """Trained tokens."""
    bytes: int = 0
    asking_s: float = 0.0
    """For so long the teacher was computing; the rest is reading, encoding and writing."""
    took_s: float = 0.0

    @classmethod
    def together(cls, ranks: Iterable[Done]) -> Done:
        """Of ranks that worked at the same time."""
        ranks = list(ranks)
        sums = (sum(getattr(done, name) for done in ranks) for name in ("tokens", "positions", "bytes"))
        return cls(*sums, max(done.asking_s for done in ranks), max(done.took_s for done in ranks))


@dataclass(frozen=True)
class Forecast:
    """Of a whole capture, by its first round: units are random parts of the data, so that one is like all."""

    disk_bytes: int
    capture_s: float
    """By one worker like this one."""
    teacher_s: float
    """What a teacher beside the student takes for the same tokens, on the same hardware."""

    @classmethod
    def of(cls, first: Done, tokens: int) -> Forecast:
        share = tokens / max(first.tokens, 1)
        return cls(round(first.bytes * share), first.took_s * share, first.asking_s * share)

    @property
    def pays_after_epochs(self) -> float:
        return self.capture_s / max(self.teacher_s, 1e-9)

    def render(self, first: Done, epochs: float | None) -> str:
        """epochs: of this recipe, if it says how many."""
        lines = [
            f"forecast by the first {first.tokens:,} tokens: {first.tokens / max(first.took_s, 1e-9):,.0f} tokens/s, "
            f"{first.bytes / max(first.positions, 1):.1f} bytes per trained token; in all {clock(self.capture_s)} of one such worker "
            f"and {self.disk_bytes / MIB:,.1f} MiB on the disk",
            f"break-even: a resident teacher takes {clock(self.teacher_s)} in every epoch of every student, the cache "
            f"{clock(self.capture_s)} once: it has paid after {self.pays_after_epochs:.2f} epochs",
        ]
        if epochs:
            saved_s = epochs * self.teacher_s - self.capture_s
            verdict = f"saves {clock(saved_s)}" if saved_s >= 0 else f"costs {clock(-saved_s)} more than it saves"
            lines.append(
                f"for this recipe's {epochs:g} epoch{'s' * (epochs != 1)} it {verdict}, and it saves {clock(epochs * self.teacher_s)} with "
                "each further student"
            )
        return "\n".join(lines)


def most_bytes(samples: int, positions: int, settings: Settings, id_bits: int) -> int:
    """Of blocks and index, if every distribution were kept up to the cap."""
    # Heads and draws of a sample are each filled up to a group of 8 ids.
    ids = -(-positions * (settings.cap + settings.draws) * id_bits // 8)
    return positions * (7 + 2 * settings.cap) + ids + samples * (RECORD.size + 2 * id_bits)


def render_progress(units: list[int], done: Done, planned: int, left: int, pace_s: float) -> str:
    """pace_s: between two units of all workers."""
    which = f"unit{'s' * (len(units) > 1)} {', '.join(map(str, units))}"
    rest = f"about {clock(left * pace_s)} left" if left else "all are there"
    return (
        f"{which}: {done.tokens:,} tokens in {done.took_s:.1f} s ({done.tokens / max(done.took_s, 1e-9):,.0f} tokens/s); "
        f"{planned - left} of {planned} units, {rest}"
    )


def clock(seconds: float) -> str:
    """12:33 minutes as 0:12:33, and what is short in seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
