"""Which metrics are drawn, and which of them in one picture: those that are read against each other.

What a run has not logged is not drawn; what it has logged and no panel names stands in the page's last table.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Line:
    key: str
    label: str


@dataclass(frozen=True)
class Panel:
    title: str
    lines: tuple[Line, ...]
    unit: str = ""
    form: str = "number"
    """number, percent, tokens or seconds: how its values are written."""
    smooths: bool = True
    """Draws a mean through training's lines, which are noisy; never through evaluations."""
    log: bool = True
    """On a logarithmic axis where the values span more than two decades, and are all positive."""
    from_zero: bool = False
    tall: bool = False
    only_with: str = ""
    """Drawn where some metric begins so; the same name means something else elsewhere."""


def both(name: str) -> tuple[Line, ...]:
    return Line(f"train/{name}", "training"), Line(f"eval/{name}", "held out")


LOSS = Panel("loss", both("loss"), tall=True)
PANELS = (
    Panel("reward", both("reward"), tall=True, log=False),
    Panel("rewards, each", (Line("train/rewards/*/mean", ""), Line("eval/rewards/*/mean", "held out")), log=False),
    Panel(
        "tool calls, held out",
        (
            Line("eval/exact_match", "exactly right"),
            Line("eval/valid_schema", "fits the schema"),
            Line("eval/valid_json", "valid JSON"),
            Line("eval/right_abstention", "right to call nothing"),
            Line("eval/teacher_exact_match", "the teacher's, exactly right"),
        ),
        form="percent",
        from_zero=True,
        tall=True,
    ),
    Panel(
        "tool calls, of samples",
        (
            Line("tools/exact_match", "exactly right"),
            Line("tools/valid_schema", "fits the schema"),
            Line("tools/right_abstention", "right to call nothing"),
            Line("tools/malformed", "malformed"),
            Line("tools/silent", "silent"),
        ),
        form="percent",
        from_zero=True,
    ),
    Panel(
        "divergence from the teacher",
        (Line("distill/kl", "training"), Line("eval/kl", "held out")),
        unit="nats a token",
        only_with="distill/",
    ),
    Panel(
        "agreement with the teacher",
        (
            Line("distill/top1_agreement", "same first token"),
            Line("eval/top1_agreement", "same first token, held out"),
            Line("distill/overlap", "shared mass"),
            Line("eval/overlap", "shared mass, held out"),
        ),
        form="percent",
    ),
    Panel("cross-entropy with the gold", (Line("distill/cross_entropy", "training"),), unit="nats a token"),
    Panel("margin of preference", both("rewards/margins"), log=False),
    Panel(
        "pairs in which the chosen answer …",
        (
            Line("train/rewards/accuracies", "has gained more"),
            Line("eval/rewards/accuracies", "has gained more, held out"),
            Line("train/logps/accuracies", "is more probable"),
            Line("eval/logps/accuracies", "is more probable, held out"),
        ),
        form="percent",
    ),
    Panel(
        "log-probability since the start",
        (
            Line("train/logps/chosen_drift", "chosen"),
            Line("train/logps/rejected_drift", "rejected"),
            Line("eval/logps/chosen_drift", "chosen, held out"),
            Line("eval/logps/rejected_drift", "rejected, held out"),
        ),
        unit="nats",
        log=False,
    ),
    Panel("pairs judged right", both("accuracy"), form="percent"),
    Panel("margin of scores", both("margin"), log=False),
    Panel("score", (Line("train/chosen_reward", "chosen"), Line("train/rejected_reward", "rejected")), log=False),
    Panel("calibration error, held out", (Line("eval/calibration_error", ""),), from_zero=True),
    Panel("divergence from the reference", both("kl"), unit="nats a token", log=False),
    Panel("tokens guessed right", both("mean_token_accuracy"), form="percent"),
    Panel("entropy", both("entropy"), unit="nats a token", log=False),
    Panel(
        "length of an answer", (Line("train/completions/mean_length", ""), Line("distill/completion_length", "")), unit="tokens", log=False
    ),
    Panel("answers cut off", (Line("train/completions/clipped_ratio", ""),), form="percent", from_zero=True),
    Panel("prompts that teach nothing", (Line("train/frac_reward_zero_std", ""),), form="percent", from_zero=True),
    Panel("learning rate", (Line("train/learning_rate", ""),), smooths=False, log=False, from_zero=True),
    Panel("gradient norm", (Line("train/grad_norm", ""),)),
    Panel("tokens a second", (Line("speed/tokens_per_s", ""),), unit="all ranks", log=False, from_zero=True),
    Panel("model FLOP utilisation", (Line("speed/mfu", ""),), form="percent", log=False, from_zero=True),
    Panel("waiting for data", (Line("speed/data_wait_fraction", ""),), unit="of a step", form="percent", log=False, from_zero=True),
    Panel(
        "memory, peak so far",
        (Line("memory/peak_gib", "tensors"), Line("memory/peak_reserved_gib", "held by the allocator")),
        unit="GiB",
        smooths=False,
        log=False,
        from_zero=True,
    ),
)


def choose_panels(keys: Iterable[str]) -> list[Panel]:
    """The panels of which at least one metric was logged, with the lines that were; each metric in the first that names it."""
    there, chosen = sorted(keys), []
    for panel in (LOSS, *PANELS):
        if not any(key.startswith(panel.only_with) for key in there):
            continue
        drawn = {line.key for earlier in chosen for line in earlier.lines}
        lines = tuple(found for line in panel.lines for found in _found(line, there) if found.key not in drawn)
        if [line.key for line in lines] == ["memory/peak_gib"]:
            # Measured so on a CPU alone.
            lines = (Line("memory/peak_gib", "resident"),)
        if lines:
            chosen.append(replace(panel, lines=lines))
    return chosen


def _found(line: Line, keys: list[str]) -> list[Line]:
    """A key with a star stands for all that fit it; what fitted is in its label."""
    pattern = re.compile("(.+)".join(map(re.escape, line.key.split("*"))))
    fits = [(key, pattern.fullmatch(key)) for key in keys]
    return [Line(key, ", ".join(filter(None, [*match.groups(), line.label]))) for key, match in fits if match]


def is_evaluation(key: str) -> bool:
    return key.startswith("eval/")
