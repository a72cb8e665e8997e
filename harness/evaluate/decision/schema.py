"""The recipe of `harness decide`: which items, which models, which prompts. As strict as a training recipe, and as frozen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from harness.errors import RecipeError
from harness.recipe.load import apply_override, read_yaml, validate
from harness.recipe.schema import PositiveInt, Section, Seed, Sources, as_sources
from harness.resources import find_config, shipped_names

FORMAT_INSTRUCTION = """\
Answer with a tool call whenever one of the tools can do what is asked, and with nothing else. Use only the tools that are listed and only \
the parameters that their schemas have. Give every required parameter, with a value of its declared type that stands in the conversation; \
leave out optional ones that nobody asked for. If no tool can do it, say so in words and call nothing."""
"""The arm `instruction`, unless the recipe has words of its own."""

RESERVED = ("base", "zero-shot", "instruction", "few-shot", "retrieval", "distilled")
ELSEWHERE = {
    "model_name_or_path": "model",
    "name_or_path": "model",
    "base_model": "model",
    "base": "model",
    "data": "items",
    "dataset": "items",
    "train": "tuning",
    "adapter": "tuned",
    "finetuned": "tuned",
    "fine_tuned": "tuned",
    "student": "distilled",
    "system_prompts": "prompts",
    "num_fewshot": "few_shot.k",
    "n_shot": "few_shot.k",
    "top_k": "retrieval.top",
    "alpha": "rules.confidence (alpha is 1 minus it)",
    "threshold": "rules.target",
    "max_tokens": "generate.max_new_tokens",
    "output": "output_dir",
}
"""Other people's names, and what stood to reason, for our keys."""


class FewShot(Section):
    """Examples before the question, as turns of the conversation. Which are taken is decided on the tuning rows, never on the items."""

    k: PositiveInt = 3
    """Examples before each question."""
    draws: PositiveInt = 2
    """Ways of choosing that are tried beside the nearest rows (BM25): so many orders drawn by `seed`. What does best on the tuning rows is
    taken."""
    tuning_rows: PositiveInt = 64
    """So many tuning rows are asked to compare the ways, each without itself among its examples."""


class Retrieval(Section):
    """Passages or tool documents, of which the nearest to the user's last words (BM25) go into the system prompt."""

    documents: str
    """A .jsonl: a row is {"text", "title"?} or a tool with its schema."""
    top: PositiveInt = 1
    """So many go in, the nearest first; none that shares no word with the question."""
    heading: str = "These may help:"
    """Stands before them."""


class Rules(Section):
    """What a verdict needs."""

    target: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """The rate of right answers at which a behaviour is good enough. An arm reaches it when the whole interval of its rate lies at or above
    it, and misses it when the whole interval lies below."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Of the intervals; 1 minus it is the level of the tests, over all of them together (Holm)."""
    fails_in: PositiveInt | None = None
    """An item fails consistently when it fails in at least so many of the prompts: zero-shot, instruction, each of `prompts`, few-shot.
    Left out: in all of them."""


class Generate(Section):
    """Answers are greedy, so that the same question has one answer."""

    max_new_tokens: PositiveInt = 256
    """An answer that is longer is cut off, and then it is wrong."""
    batch_size: PositiveInt = 16
    """Prompts at once."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type in which weights are loaded; `auto` is what their files have."""


class Planned(Section):
    """The training that a verdict to fine-tune would mean, for its hours: as `harness plan` has it."""

    recipe: str
    """A training recipe: a file, or the name of a shipped one."""
    processes: PositiveInt = 1
    """GPUs of each node."""
    nodes: PositiveInt = 1
    """Nodes."""
    tokens: Annotated[float, Field(gt=0)] | None = None
    """Of one epoch of its data; without it a recipe with `max_steps` alone can be planned."""
    tokens_per_s: Annotated[float, Field(gt=0)] | None = None
    """A throughput of all GPUs, stated. Exactly one of this and `measured` is given: nothing is said about time without a measurement."""
    measured: str | None = None
    """A run folder whose throughput is taken."""


class Decision(Section):
    """One decision: the same items under every arm."""

    items: Sources
    """Conversations whose last assistant turn is the gold, as in `data.eval` of a training recipe. A row's key `behaviour` says what it
    shows; without it that is the name of the tool that is called (tools with too few items are pooled), `parallel calls` or `calls
    nothing`."""
    model: str
    """The base: a folder, a run folder, a hub id or embedded:NAME."""
    tuned: dict[str, str] = {}
    """Name -> a run folder or an export of it: fine-tuned models or adapters, each asked alone and with retrieval."""
    distilled: str | None = None
    """A run folder or an export: the small model that has learnt from the fine-tuned one."""
    prompts: dict[str, str] = {}
    """Name -> a system prompt that is tried. It stands before the system message that a row has of its own."""
    instruction: str = FORMAT_INSTRUCTION
    """The format instruction, a system prompt that every decision tries; left out: the built-in one."""
    tuning: Sources = ()
    """Rows of the same kind, from which few-shot examples are taken and on which they are chosen. None of them may be among the items."""
    few_shot: FewShot | None = None
    """Left out: with the defaults where there are tuning rows, and without them no few-shot arm."""
    retrieval: Retrieval | None = None
    """Left out: no arm retrieves."""
    guards: Sources = ()
    """More rows, of behaviours that are to stay as they are: they get no verdict, but a fall is reported."""
    plan: Planned | None = None
    """Left out: the report has the hours of the models that are there, and none that are to come."""
    rules: Rules = Rules()
    generate: Generate = Generate()
    seed: Seed = 0
    """Of the draws of examples."""
    output_dir: str | None = None
    """Where the report and the answers are written. Left out: runs/decide-<name of the file>."""


def load_decision(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Decision:
    """Read, override, validate. Raises RecipeError (exit code 2) for everything that is wrong, each with its dotted key."""
    file = find_config(str(path), "decide")
    if file is None:
        known = ", ".join(f"decide/{name}" for name in shipped_names("decide"))
        raise RecipeError(f"{path}: no such file of a decision; give the path of a YAML file or one of: {known}")
    settings = read_yaml(file)
    for key in ("items", "tuning", "guards"):
        if key in settings:
            settings[key] = as_sources(settings[key])
    for override in overrides:
        apply_override(settings, override)
    settings.setdefault("output_dir", f"runs/decide-{file.stem}")
    decision = validate(Decision, settings, str(file), ELSEWHERE)
    problems = check_rules(decision)
    if problems:
        raise RecipeError("\n".join(f"{file}: {problem}" for problem in problems))
    return decision


def prompt_arms(decision: Decision) -> list[str]:
    """Names of the arms that are nothing but a prompt to the base."""
    return ["zero-shot", "instruction", *decision.prompts, *(["few-shot"] if decision.tuning else [])]


def check_rules(decision: Decision) -> list[str]:
    """What no field can say alone, a line for each problem."""
    problems = []
    if not decision.items:
        problems.append("items = []; must name at least one file of conversations whose last turn is the gold")
    if decision.few_shot and not decision.tuning:
        problems.append("few_shot is set, and there is nothing to choose examples from; set tuning to rows that are not among the items")
    for key in ("items", "tuning", "guards"):
        for at, source in enumerate(getattr(decision, key)):
            if source.weight != 1:
                problems.append(f"{key}.{at}.weight = {source.weight}; a row is asked once; leave weight out (max_rows takes fewer)")
    names = [*decision.prompts, *decision.tuned]
    for section, name in [*(("prompts", name) for name in decision.prompts), *(("tuned", name) for name in decision.tuned)]:
        if not re.fullmatch(r"[\w.-]+", name):
            problems.append(f'{section}: the name "{name}" is not one for a file; must be letters, digits, "-", "_" and "."')
        elif name in RESERVED or names.count(name) > 1:
            problems.append(f'{section}: the name "{name}" is another arm\'s already; choose another one')
    if decision.plan and (decision.plan.tokens_per_s is None) == (decision.plan.measured is None):
        both = "neither" if decision.plan.measured is None else "both"
        problems.append(f"plan: has {both} of tokens_per_s and measured; must have one, from which hours can be said")
    known = prompt_arms(decision)
    if decision.rules.fails_in and decision.rules.fails_in > len(known):
        problems.append(
            f"rules.fails_in = {decision.rules.fails_in}; must be at most {len(known)}, the number of prompts ({', '.join(known)})"
        )
    return problems
