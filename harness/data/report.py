"""What became of the rows: counts that are stored with prepared data and shown to people."""

from __future__ import annotations

from dataclasses import dataclass, field

SPLITS = ("train", "eval")
EXAMPLES = 5  # locations that a report names per reason


@dataclass
class Dropped:
    """How many rows, and where the first few of them are."""

    rows: int = 0
    locations: list[str] = field(default_factory=list)

    def add(self, rows: int, locations: list[str]) -> None:
        self.rows += rows
        self.locations = (self.locations + locations)[:EXAMPLES]


@dataclass
class SplitReport:
    """What became of the rows of one split; lengths and tokens count what is left, without padding."""

    rows_in: int = 0
    rows: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)  # reason -> rows
    shortened_rows: int = 0
    dropped_messages: int = 0  # cut off the end of rows longer than max_length
    tokens: int = 0
    trained_tokens: int = 0
    control_tokens: Dropped = field(default_factory=Dropped)  # rows kept, in whose words a control token of the tokenizer stands
    length_percentiles: dict[str, int] = field(default_factory=dict)
    packs: int | None = None
    fill_rate: float | None = None  # share of the packs' tokens that are not empty

    def drop(self, reason: str, location: str) -> None:
        self.dropped.setdefault(reason, Dropped()).add(1, [location])

    def merge(self, other: SplitReport) -> None:
        """Add the counts of rows that come after these."""
        for name in ("rows_in", "rows", "shortened_rows", "dropped_messages", "tokens", "trained_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, dropped in other.dropped.items():
            self.dropped.setdefault(reason, Dropped()).add(dropped.rows, dropped.locations)
        self.control_tokens.add(other.control_tokens.rows, other.control_tokens.locations)


@dataclass
class PrepareReport:
    train: SplitReport
    eval: SplitReport | None = None
    mask_source: str = ""  # what says which tokens are trained
    skipped: Dropped = field(default_factory=Dropped)  # raw rows that never became canonical ones (data.on_error: skip)

    @classmethod
    def from_json(cls, value: dict) -> PrepareReport:
        def split(raw: dict | None) -> SplitReport | None:
            if raw is None:
                return None
            dropped = {reason: Dropped(**counts) for reason, counts in raw["dropped"].items()}
            return SplitReport(**{**raw, "dropped": dropped, "control_tokens": Dropped(**raw["control_tokens"])})

        return cls(split(value["train"]), split(value["eval"]), value["mask_source"], Dropped(**value["skipped"]))


def render_report(report: PrepareReport) -> str:
    """Counts as plain text, a paragraph per split."""
    lines = []
    for split in SPLITS:
        counts: SplitReport | None = getattr(report, split)
        if counts is None:
            continue
        lines.append(f"{split}: {counts.rows:,} of {counts.rows_in:,} rows, {counts.tokens:,} tokens, {_share(counts)} trained")
        lines.append("  tokens per row  " + "  ".join(f"{name} {value:,}" for name, value in counts.length_percentiles.items()))
        if counts.packs is not None:
            lines.append(f"  packs           {counts.packs:,}, {counts.fill_rate:.1%} full, {counts.rows / counts.packs:.1f} rows in each")
        if counts.shortened_rows:
            lines.append(f"  shortened       {counts.shortened_rows:,} rows by {counts.dropped_messages:,} messages, to fit max_length")
        if counts.control_tokens.rows:
            lines += _dropped_lines("kept, but a control token stands in the words", counts.control_tokens)
        for reason, dropped in counts.dropped.items():
            lines += _dropped_lines(f"dropped, {reason}", dropped)
    lines.append(f"masks: {report.mask_source}")
    if report.skipped.rows:
        lines.append("sources:")
        lines += _dropped_lines("skipped, not readable as rows", report.skipped)
    return "\n".join(lines)


def _share(counts: SplitReport) -> str:
    return f"{counts.trained_tokens:,} ({counts.trained_tokens / counts.tokens:.1%})"


def _dropped_lines(what: str, dropped: Dropped) -> list[str]:
    lines = [f"  {what}: {dropped.rows:,}", *(f"    {location}" for location in dropped.locations)]
    more = dropped.rows - len(dropped.locations)
    return lines + ([f"    and {more:,} more"] if more else [])
