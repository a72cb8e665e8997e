"""What a check of a node or of a cluster has found, and how a person reads it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    host: str
    level: Literal["ok", "warn", "fail"]
    what: str
    remedy: str = ""
    blames_node: bool = False
    """Whether another node in its place could do better."""


def render_findings(findings: Iterable[Finding]) -> str:
    """A line for each, its remedy below it: `r2  FAIL  2 of 4 GPUs are visible`."""
    findings = list(findings)
    width = max((len(finding.host) for finding in findings), default=0)
    lines = []
    for finding in findings:
        level = finding.level if finding.level == "ok" else finding.level.upper()
        lines.append(f"{finding.host:<{width}}  {level:<4}  {finding.what}")
        if finding.remedy:
            lines.append(f"{'':<{width}}        {finding.remedy}")
    return "\n".join(lines)
