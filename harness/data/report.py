"""What became of the rows: counts that are stored with prepared data and shown to people."""

from __future__ import annotations

from dataclasses import dataclass, field

SPLITS = ("train", "eval")
SUMS = (
    "rows_in", "rows", "shortened_rows", "dropped_messages", "tokens", "trained_tokens", "chosen_tokens", "rejected_tokens",
    "shared_prompts", "margins", "good_rows", "bad_rows",
)  # fmt: skip
LONG_GAP = 0.25  # of the mean length; beyond it the length of an answer alone says much about which is chosen
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
    chosen_tokens: int = 0  # trained ones of the chosen answers of pairs
    rejected_tokens: int = 0
    shared_prompts: int = 0  # pairs whose two sides begin with the same tokens, up to the first that is trained
    margins: int = 0  # pairs that have one
    good_rows: int = 0  # labelled answers
    bad_rows: int = 0
    packs: int | None = None
    fill_rate: float | None = None  # share of the packs' tokens that are not empty

    def drop(self, reason: str, location: str) -> None:
        self.dropped.setdefault(reason, Dropped()).add(1, [location])

    def merge(self, other: SplitReport) -> None:
        """Add the counts of rows that come after these."""
        for name in SUMS:
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
        what = "pairs" if counts.chosen_tokens else "rows"
        lines.append(f"{split}: {counts.rows:,} of {counts.rows_in:,} {what}, {counts.tokens:,} tokens, {_share(counts)} trained")
        lines += _preference_lines(counts)
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


def length_gap(counts: SplitReport) -> float:
    """By how much chosen answers are longer than rejected ones, in trained tokens, as a share of the mean of both; 0 without pairs."""
    both = counts.chosen_tokens + counts.rejected_tokens
    return 2 * (counts.chosen_tokens - counts.rejected_tokens) / both if both else 0.0


def warn_of_lengths(report: PrepareReport) -> list[str]:
    """A line for each split in whose pairs the length of an answer gives away which it is."""
    lines = []
    for split in SPLITS:
        counts: SplitReport | None = getattr(report, split)
        if counts is not None and abs(length_gap(counts)) > LONG_GAP:
            means = (f"{tokens / counts.rows:.0f}" for tokens in (counts.chosen_tokens, counts.rejected_tokens))
            lines.append(
                "warning: data.{}: chosen answers have {} trained tokens on average, rejected ones {}; length is the shortcut that "
                "preference training is known to take, so the model may learn that in place of what is better".format(split, *means)
            )
    return lines


def _preference_lines(counts: SplitReport) -> list[str]:
    lines = []
    if counts.chosen_tokens:
        chosen, rejected = counts.chosen_tokens / counts.rows, counts.rejected_tokens / counts.rows
        lines.append(f"  trained tokens  chosen {chosen:.1f}, rejected {rejected:.1f} on average ({length_gap(counts):+.1%} of the mean)")
        lines.append(f"  same prompt     {counts.shared_prompts:,} of {counts.rows:,} pairs, token by token")
        lines += [f"  margins         {counts.margins:,} pairs have one"] if counts.margins else []
    if counts.good_rows or counts.bad_rows:
        lines.append(f"  labels          {counts.good_rows:,} good, {counts.bad_rows:,} bad")
    return lines


def _share(counts: SplitReport) -> str:
    return f"{counts.trained_tokens:,} ({counts.trained_tokens / counts.tokens:.1%})"


def _dropped_lines(what: str, dropped: Dropped) -> list[str]:
    lines = [f"  {what}: {dropped.rows:,}", *(f"    {location}" for location in dropped.locations)]
    more = dropped.rows - len(dropped.locations)
    return lines + ([f"    and {more:,} more"] if more else [])
