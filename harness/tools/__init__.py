"""Tool schemas, calls read from text, and the one scorer. No torch: it runs on a login node."""

from harness.tools.answers import FAULTS, Fault, read_answer, read_turn
from harness.tools.calls import ParsedCalls, ToolCall, parse_calls, read_call, spoken
from harness.tools.checks import Problem, check_call, check_tool
from harness.tools.documents import check_value
from harness.tools.gold import read_gold
from harness.tools.match import (
    FAILURES,
    Match,
    OneOf,
    Score,
    breaks_schema,
    fits,
    json_equal,
    judge_strictly,
    match_calls,
    render_gold,
    same_call,
    score,
    summarise,
)
from harness.tools.repair import REPAIRABLE, Repair, problems_of, repair_call
from harness.tools.schema import did_you_mean, normalise_tool, normalise_tools, parse_type

__all__ = [
    "FAILURES",
    "FAULTS",
    "REPAIRABLE",
    "Fault",
    "Match",
    "OneOf",
    "ParsedCalls",
    "Problem",
    "Repair",
    "Score",
    "ToolCall",
    "breaks_schema",
    "check_call",
    "check_tool",
    "check_value",
    "repair_call",
    "did_you_mean",
    "fits",
    "json_equal",
    "judge_strictly",
    "match_calls",
    "normalise_tool",
    "normalise_tools",
    "parse_calls",
    "parse_type",
    "problems_of",
    "read_answer",
    "read_call",
    "read_gold",
    "read_turn",
    "render_gold",
    "same_call",
    "score",
    "spoken",
    "summarise",
]
