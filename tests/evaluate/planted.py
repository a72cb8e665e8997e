"""Behaviours planted through tables: which arm gets which item right, and how it fails else. No model."""

from harness.evaluate.decision.verdicts import Measured, Outcome

RIGHT = Outcome(True, None, formed=True, calls=True)
GARBLED = Outcome(False, "malformed", formed=False, calls=False)
WRONG_VALUE = Outcome(False, "wrong_value", formed=True, calls=True)
WRONG_TOOL = Outcome(False, "wrong_tool", formed=True, calls=True)
SILENT = Outcome(False, "no_call", formed=True, calls=False)
NEEDLESS = Outcome(False, "unneeded_call", formed=True, calls=True)

KINDS = {
    "zero-shot": "zero-shot",
    "instruction": "prompt",
    "polite": "prompt",
    "few-shot": "few-shot",
    "retrieval": "retrieval",
    "sft": "tuned",
    "sft+retrieval": "tuned+retrieval",
    "distilled": "distilled",
}
TOKENS = dict.fromkeys(KINDS, 100) | {"instruction": 160, "polite": 110, "few-shot": 400, "retrieval": 150, "sft+retrieval": 150}


def ids_of(behaviour: str, count: int = 32) -> list[str]:
    return [f"{behaviour}-{number}" for number in range(count)]


def plant(**behaviours: dict) -> list[Measured]:
    """behaviour -> arm -> the outcomes of its items (one Outcome: of all 32 items; a number n: the first n right, the others a wrong
    value). `otherwise` is of the arms that are not named; an arm that no behaviour names is there as well."""
    arms = []
    for name, kind in KINDS.items():
        outcomes = {}
        for behaviour, table in behaviours.items():
            given = table.get(name, table.get("otherwise", RIGHT))
            count = table.get("items", 32)
            if isinstance(given, int):
                given = [RIGHT] * given + [WRONG_VALUE] * (count - given)
            if isinstance(given, Outcome):
                given = [given] * count
            assert len(given) == count
            outcomes |= dict(zip(ids_of(behaviour, count), given, strict=True))
        arms.append(Measured(name, kind, outcomes, TOKENS[name], "sft" if name.startswith("sft") else None))
    return arms


def without(arms: list[Measured], *names: str) -> list[Measured]:
    return [arm for arm in arms if arm.name not in names]
