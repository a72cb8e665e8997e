"""From what every arm got right, on the same items, to one verdict for each behaviour: prompt, retrieve, train, or mend the data.

The order is that of what a remedy costs to try and to undo, with two exceptions: gold that is wrong is found first, because no arm can be
judged by it, and nothing is said where nothing is shown.

1. **fix the schema or the data**: of the behaviour's items more than `1 - target` have gold that breaks its own tool's schema or
   contradicts itself. That is all that the target leaves, so no model that keeps to its schema could reach it. Below that share the faulty
   items are left out.
2. **not enough evidence**: so few items that not even all of them right would show the target.
3. **keep prompting**: the base reaches the target, as the row asks or with the cheapest prompt or examples that do. Words are tried before
   weights because they cost nothing to change.
4. **retrieve**: no prompt reaches it, and the documents do: what is missing is a fact, and facts change oftener than weights should.
5. **not enough evidence**: some prompt, or retrieval, may still reach the target; its interval lies on both sides of it.
6. **keep prompting**: every prompt misses the target, but the items do not fail consistently: each prompt fails on others, so the model can
   do it, and the prompt is not found yet. An item fails consistently when it fails in at least `fails_in` of the prompts. A behaviour does
   when the share of such items lies above `1 - target` by its whole interval, and does not when all of it lies at or below; between the two
   there is not enough evidence.
7. **fine-tune**, with the method of the cheapest trained model that reaches the target, where one does; not enough evidence
   where one reaches it, and may be better than zero-shot by chance. Else by the failures:
   *with DPO* where most items that fail consistently either fail by a wrong choice between answers of a right form (a needless call,
   another tool than the right one, or no call by a model that forms calls here at all), or are answered rightly under some prompt: the
   right answer is within the model's reach and has to become the likelier one. Also where a model that was fine-tuned with SFT still fails
   in this way.
   *with SFT* otherwise: what is not in the model, the form of a call or the tool itself, has to be shown to it first.

An arm *reaches* the target when the whole Wilson interval of its rate lies at or above it, *misses* it when all of it lies below, and is
*open* otherwise. It is better or worse than zero-shot when McNemar's exact test on the same items says so below `1 - confidence`, after
Holm's correction over all arms and behaviours, guards included. A remedy needs both: to reach the target, and to be better, unless
zero-shot is open itself. What is significantly worse than zero-shot is a regression, whichever arm and behaviour.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from statistics import NormalDist

from harness.evaluate.statistics import holm, mcnemar_exact, wilson_interval

KEEP, RETRIEVE, SFT, DPO = "keep prompting", "retrieve", "fine-tune with SFT", "fine-tune with DPO"
FIX, UNKNOWN = "fix the schema or the data", "not enough evidence"
VERDICTS = (KEEP, RETRIEVE, SFT, DPO, FIX, UNKNOWN)
REACHES, MISSES, OPEN = "reaches", "misses", "open"

PROMPTS = ("zero-shot", "prompt", "few-shot")
TRAINED = ("tuned", "tuned+retrieval", "distilled")
"""Kinds of arms."""
CHOICES = ("unneeded_call", "no_call", "wrong_tool")
"""Failures that are a wrong choice between answers of a right form; the others are of form, or of values."""
MOST_ITEMS = 100_000
"""Beyond it, a number of items that would be needed is not worth saying."""


@dataclass(frozen=True)
class Outcome:
    """One answer. `formed`: whatever it calls can be read and is taken by its tool's schema; without a call it says something."""

    right: bool
    failure: str | None
    formed: bool
    calls: bool


@dataclass(frozen=True)
class Measured:
    """One arm: what became of every item that it was asked. `method` of training: sft, dpo, …, None of the base."""

    name: str
    kind: str
    outcomes: Mapping[str, Outcome]
    tokens: float
    """Per answer, prompt and all: what running it costs."""
    method: str | None = None


@dataclass(frozen=True)
class Limits:
    target: float = 0.8
    confidence: float = 0.95
    fails_in: int | None = None


@dataclass
class Row:
    """One arm on one behaviour. gained, lost: items that this arm alone or zero-shot alone has right."""

    arm: str
    kind: str
    n: int
    right: int
    interval: tuple[float, float] | None
    state: str
    gained: int
    lost: int
    p: float | None
    p_holm: float | None = None
    failures: dict[str, int] = field(default_factory=dict)

    @property
    def rate(self) -> float | None:
        return self.right / self.n if self.n else None


@dataclass
class Verdict:
    behaviour: str
    items: int
    faulty: dict[str, str]
    rows: list[Row]
    prompts: list[str]
    fails_in: int
    consistent: list[str]
    consistent_interval: tuple[float, float] | None
    verdict: str = ""
    arm: str | None = None
    """The arm that reaches the target, where the verdict names one."""
    reasons: list[str] = field(default_factory=list)
    needs: int | None = None
    """About so many items would show it."""

    def row(self, arm: str) -> Row:
        return next(row for row in self.rows if row.arm == arm)


@dataclass(frozen=True)
class Regression:
    behaviour: str
    arm: str
    guarded: bool
    """Of the guards; else of the items."""
    before: float
    after: float
    n: int
    gained: int
    lost: int
    p_holm: float


def decide(
    behaviours: Mapping[str, Sequence[str]],
    faults: Mapping[str, str],
    arms: Sequence[Measured],
    limits: Limits,
    guards: Mapping[str, Sequence[str]] = {},  # noqa: B006 - read, not written
) -> tuple[list[Verdict], list[list[Row]], list[Regression]]:
    """(a verdict for each behaviour, the rows of each guard in their order, what got worse).

    behaviours, guards: name -> ids of its items. faults: item id -> what is wrong with its gold. The first arm is zero-shot; arms of kinds
    zero-shot, prompt and few-shot are the prompts.
    """
    verdicts = [_measure(name, ids, faults, arms, limits) for name, ids in behaviours.items()]
    guarded = [_rows([id for id in ids if id not in faults], arms, limits) for ids in guards.values()]
    tested = [row for rows in (*(verdict.rows for verdict in verdicts), *guarded) for row in rows if row.p is not None]
    for row, p in zip(tested, holm([row.p for row in tested]), strict=True):
        row.p_holm = p
    for verdict in verdicts:
        _judge(verdict, arms, limits)
    alpha = 1 - limits.confidence
    regressions = []
    for name, rows, of_guard in (
        *((v.behaviour, v.rows, False) for v in verdicts),
        *zip(guards, guarded, [True] * len(guarded), strict=True),
    ):
        for row in rows[1:]:
            if row.p_holm is not None and row.p_holm < alpha and row.lost > row.gained:
                regressions.append(Regression(name, row.arm, of_guard, rows[0].rate, row.rate, row.n, row.gained, row.lost, row.p_holm))
    return verdicts, guarded, regressions


# ---- measuring


def _measure(name: str, ids: Sequence[str], faults: Mapping[str, str], arms: Sequence[Measured], limits: Limits) -> Verdict:
    sound = [id for id in ids if id not in faults]
    prompts = [arm for arm in arms if arm.kind in PROMPTS]
    fails_in = limits.fails_in or len(prompts)
    consistent = [id for id in sound if sum(not arm.outcomes[id].right for arm in prompts) >= fails_in]
    return Verdict(
        behaviour=name,
        items=len(ids),
        faulty={id: faults[id] for id in ids if id in faults},
        rows=_rows(sound, arms, limits),
        prompts=[arm.name for arm in prompts],
        fails_in=fails_in,
        consistent=consistent,
        consistent_interval=wilson_interval(len(consistent), len(sound), limits.confidence),
    )


def _rows(ids: Sequence[str], arms: Sequence[Measured], limits: Limits) -> list[Row]:
    plain = arms[0].outcomes
    rows = []
    for arm in arms:
        right = sum(arm.outcomes[id].right for id in ids)
        gained = sum(arm.outcomes[id].right and not plain[id].right for id in ids)
        lost = sum(plain[id].right and not arm.outcomes[id].right for id in ids)
        interval = wilson_interval(right, len(ids), limits.confidence)
        p = mcnemar_exact(gained, lost) if arm is not arms[0] and ids else None
        failures = Counter(arm.outcomes[id].failure for id in ids if not arm.outcomes[id].right)
        state = state_of(interval, limits.target)
        rows.append(Row(arm.name, arm.kind, len(ids), right, interval, state, gained, lost, p, failures=dict(failures.most_common())))
    return rows


def state_of(interval: tuple[float, float] | None, target: float) -> str:
    if interval is None:
        return OPEN
    return REACHES if interval[0] >= target else MISSES if interval[1] < target else OPEN


def least_items(limits: Limits) -> int:
    """So many items, all right, just show the target."""
    z = NormalDist().inv_cdf((1 + limits.confidence) / 2)
    # Where all are right Wilson's lower bound is n / (n + z * z).
    return math.ceil(z * z * limits.target / (1 - limits.target))


def items_needed(rate: float, limits: Limits) -> int | None:
    """At how many items a rate like this one would lie on one side of the target for sure; None where that is beyond any effort."""
    n = least_items(limits)
    while n < MOST_ITEMS:
        right = round(rate * n)
        if state_of(wilson_interval(right, n, limits.confidence), limits.target) != OPEN:
            return n
        n = math.ceil(n * 1.05)
    return None


def items_to_tell(row: Row, limits: Limits) -> int | None:
    """At how many items a gain like this row's would be significant after the correction that it had here."""
    times = row.p_holm / row.p
    for n in range(row.n, MOST_ITEMS, max(1, row.n // 8)):
        if mcnemar_exact(round(row.gained * n / row.n), round(row.lost * n / row.n)) * times < 1 - limits.confidence:
            return n
    return None


# ---- judging


def _judge(verdict: Verdict, arms: Sequence[Measured], limits: Limits) -> None:
    """The rules of the module's docstring, in their order."""
    alpha, plain = 1 - limits.confidence, verdict.rows[0]
    tokens = {arm.name: arm.tokens for arm in arms}

    def better(row: Row) -> bool:
        return row.p_holm is not None and row.p_holm < alpha and row.gained > row.lost

    def best(rows: Sequence[Row]) -> Row | None:
        """The cheapest that reaches the target and is better than zero-shot, or as good where that is open."""
        fit = [row for row in rows if row.state == REACHES and (better(row) or plain.state == OPEN)]
        return min(fit, key=lambda row: tokens[row.arm], default=None)

    prompted = [row for row in verdict.rows if row.arm in verdict.prompts[1:]]
    retrieved = [row for row in verdict.rows if row.kind == "retrieval"]
    # As it is written: to floats, 2 of 10 are more than 1 - 0.8.
    if len(verdict.faulty) > (1 - Fraction(str(limits.target))) * verdict.items:
        _say(verdict, FIX, None, *_about_faults(verdict, limits))
    elif plain.n < (least := least_items(limits)):
        verdict.needs = least
        left_out = f" ({len(verdict.faulty)} more are left out, their gold is faulty)" if verdict.faulty else ""
        _say(verdict, UNKNOWN, None, f"{plain.n} items{left_out}; even if all were right, {least} are needed to show {limits.target:.0%}")
    elif plain.state == REACHES:
        _say(verdict, KEEP, plain.arm, f"the base does it as it is asked: {shown(plain)}")
    elif found := best(prompted):
        _say(verdict, KEEP, found.arm, f"a prompt does it: {found.arm} {shown(found)}, zero-shot {shown(plain)}", _about_test(found))
    elif found := best(retrieved):
        _say(verdict, RETRIEVE, found.arm, f"with the documents {shown(found)}, zero-shot {shown(plain)}", _about_test(found))
        _say_of_best_prompt(verdict, [plain, *prompted])
    elif waiting := [row for row in (plain, *prompted, *retrieved) if row.state != MISSES]:
        _say_what_is_open(verdict, max(waiting, key=lambda row: row.rate), limits)
    elif verdict.consistent_interval[0] <= 1 - limits.target:
        _judge_inconsistent(verdict, [plain, *prompted], limits)
    else:
        _judge_training(verdict, arms, limits, best, better)


def _say_what_is_open(verdict: Verdict, row: Row, limits: Limits) -> None:
    if row.state == OPEN:
        verdict.needs = items_needed(row.rate, limits)
        about = (
            f"about {verdict.needs} would show it" if verdict.needs else "it lies so near the target that no number of items would show it"
        )
        _say(verdict, UNKNOWN, None, f"{row.arm} may reach {limits.target:.0%} or not: {shown(row)} of {row.n} items; {about}")
    else:
        verdict.needs = items_to_tell(row, limits)
        _say(
            verdict,
            UNKNOWN,
            None,
            f"{row.arm} {shown(row)} may be better than zero-shot by chance; about {verdict.needs} items would show it",
        )
        verdict.reasons.append(_about_test(row))


def _judge_inconsistent(verdict: Verdict, prompted: Sequence[Row], limits: Limits) -> None:
    """Every prompt misses, and it is not shown that the same items fail under all of them."""
    share = f"{len(verdict.consistent)} of {prompted[0].n} items fail {in_prompts(verdict.fails_in, len(verdict.prompts))}"
    if verdict.consistent_interval[1] <= 1 - limits.target:
        found = "each prompt fails on others, so the right one is not found yet"
        _say(verdict, KEEP, None, f"no prompt reaches {limits.target:.0%}, but only {share}: {found}")
        _say_of_best_prompt(verdict, prompted)
    else:
        verdict.needs = items_needed(1 - len(verdict.consistent) / prompted[0].n, limits)
        about = f"about {verdict.needs} items would show it" if verdict.needs else "no number of items would show it"
        _say(
            verdict,
            UNKNOWN,
            None,
            f"no prompt reaches {limits.target:.0%}; whether the same items fail under all is open: {share}; {about}",
        )


def _judge_training(verdict: Verdict, arms: Sequence[Measured], limits: Limits, best, better) -> None:
    """Every prompt misses, and the same items fail under all of them."""
    n, low = verdict.rows[0].n, verdict.consistent_interval[0]
    failing = (
        f"{len(verdict.consistent)} of {n} items fail {in_prompts(verdict.fails_in, len(verdict.prompts))} "
        f"(at least {low:.0%} of such items do)"
    )
    trained = [row for row in verdict.rows if row.kind in TRAINED]
    method = {arm.name: arm.method for arm in arms}
    if found := best(trained):
        _say(
            verdict,
            _method_verdict(method[found.arm]),
            found.arm,
            f"trained, {found.arm} does it: {shown(found)}, zero-shot {shown(verdict.rows[0])}",
            failing,
            _about_test(found),
        )
        return
    if reaching := [row for row in trained if row.state == REACHES]:
        _say_what_is_open(verdict, max(reaching, key=lambda row: row.rate), limits)
        verdict.reasons.append(failing)
        return
    choices, within, total = _kinds_of_failure(verdict, [arm for arm in arms if arm.name in verdict.prompts])
    kinds = (
        f"of the {total} items that fail consistently {choices} fail by a choice between answers of a right form, and {within} are "
        "answered rightly under some prompt"
    )
    sft = [row for row in trained if row.kind == "tuned" and method[row.arm] not in PREFERENCE_METHODS]
    if trained:
        last = max(sft or trained, key=lambda row: row.rate)
        remaining, wrong = _remaining_choices(verdict, next(arm for arm in arms if arm.name == last.arm)), last.n - last.right
        so_far = f"trained, {last.arm} does not reach it yet: {shown(last)}{', though it is better' if better(last) else ''}"
        if sft and remaining * 2 > wrong:
            _say(verdict, DPO, None, failing, so_far, f"{remaining} of its {wrong} failures are choices between answers of a right form")
        else:
            more = (
                "more rows of this behaviour, or more steps" if better(last) else "rows of this behaviour: this training did not teach it"
            )
            _say(verdict, SFT, None, failing, so_far, f"it needs {more}")
        if not any(row.right for row in verdict.rows):
            verdict.reasons.append("no arm, trained ones included, has a single item right: read its rows before training again")
        return
    chosen = DPO if max(choices, within) * 2 > total else SFT
    _say(verdict, chosen, None, failing, kinds, "no fine-tuned model was among the arms: this says what to try first")


PREFERENCE_METHODS = ("dpo", "kto", "rlhf", "grpo", "rloo")
"""Tasks of a run whose model was trained on preferences or rewards."""


def _method_verdict(method: str | None) -> str:
    return DPO if method in PREFERENCE_METHODS else SFT


def _kinds_of_failure(verdict: Verdict, prompts: Sequence[Measured]) -> tuple[int, int, int]:
    """(items that always fail by a choice, items that some prompt has right, all) of those that fail consistently.

    Calling nothing is a choice only of a model that forms calls: of one that never does, on any of these items, it is ignorance.
    """
    ids = [id for id in prompts[0].outcomes if id in set(verdict.consistent)]
    forms_calls = any(arm.outcomes[id].calls and arm.outcomes[id].formed for arm in prompts for id in ids)

    def is_choice(outcome: Outcome) -> bool:
        if outcome.failure == "no_call":
            return forms_calls
        return outcome.failure in CHOICES and outcome.formed

    failing = {id: [arm.outcomes[id] for arm in prompts if not arm.outcomes[id].right] for id in ids}
    choices = sum(all(map(is_choice, outcomes)) for outcomes in failing.values())
    within = sum(len(outcomes) < len(prompts) for outcomes in failing.values())
    return choices, within, len(ids)


def _remaining_choices(verdict: Verdict, arm: Measured) -> int:
    """Of the items that fail consistently; the model was trained on calls, so that calling nothing is a choice of it."""
    outcomes = [arm.outcomes[id] for id in verdict.consistent]
    return sum(outcome.failure in CHOICES and outcome.formed for outcome in outcomes)


# ---- words


def in_prompts(fails_in: int, prompts: int) -> str:
    return f"in all {prompts} prompts" if fails_in == prompts else f"in at least {fails_in} of {prompts} prompts"


def shown(row: Row) -> str:
    low, high = row.interval
    return f"{row.rate:.0%} ({low:.0%} to {high:.0%})"


def shown_p(p: float, equals: str = "") -> str:
    return "< 0.001" if p < 0.001 else f"{equals}{p:.3f}" if p < 0.1 else f"{equals}{p:.2f}"


def _say(verdict: Verdict, said: str, arm: str | None, *reasons: str) -> None:
    verdict.verdict, verdict.arm = said, arm
    verdict.reasons.extend(reasons)


def _about_test(row: Row) -> str:
    return f"against zero-shot {row.gained} items won and {row.lost} lost, p {shown_p(row.p_holm, '= ')} after Holm's correction"


def _say_of_best_prompt(verdict: Verdict, prompted: Sequence[Row]) -> None:
    row = max(prompted, key=lambda row: row.rate)
    verdict.reasons.append(f"the best prompt, {row.arm}: {shown(row)}")


def _about_faults(verdict: Verdict, limits: Limits) -> list[str]:
    kinds = Counter(reason.partition(":")[0].partition(", which")[0] for reason in verdict.faulty.values())
    counted = Counter("gold breaks its tool's schema" if "schema" in kind else "gold contradicts itself" for kind in kinds.elements())
    said = ", ".join(f"{kind} in {count} of {verdict.items} items" for kind, count in counted.items())
    first = next(iter(verdict.faulty.items()))
    return [
        f"{said}; the target leaves {1 - limits.target:.0%}, so no model that keeps to its schema can reach it",
        f"for example {first[0]}: {first[1]}",
    ]
