"""`harness pairs`: a run's exported model answers questions that it is not evaluated on, and its failures become preference pairs.

Three steps, of which only the second needs the model, and any number of processes may share it (harness.units): plan what is asked, ask,
mine. harness/evaluate/mining.py says what is written and promised. The same command goes on where it was stopped; with other --classes,
--max-per-class or --edits it mines what is there anew, and asks nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import model as models
from harness.data import ASK_ONLY, KIND_OF_ROWS
from harness.data.overlap import Overlap
from harness.data.rows import SourceRow, content_digest, data_fingerprint
from harness.data.sources import LoadedRows, load_rows, mix
from harness.data.templates import check_tokenizer
from harness.embedded import resolve
from harness.errors import DataError, EvaluationError, RecipeError
from harness.evaluate.mining import LEAST_TOKENS, Case, LeftOut, Scribe, asked_of, known_questions, mine, report_of, select_cases, words_of
from harness.model.export import verify_export
from harness.recipe import Recipe, load
from harness.recipe.load import apply_override, render_recipe, validate
from harness.recipe.rules import check_rules
from harness.recipe.schema import Source
from harness.run import RunDir, write_text_atomically
from harness.tasks.generate import ask_prompts
from harness.tasks.templates import training_template
from harness.tools import FAILURES
from harness.units import Worker, committing

ASKING, ANSWERS, QUESTIONS = "generate.yaml", "answers", "questions.jsonl"
PAIRS, REPORT, LEFT_OUT = "pairs.jsonl", "pairs.report.json", "left-out.jsonl"
MAY_BE_SET = ("generate.", "model.dtype", "model.quantization", "model.attn_implementation", "data.seed", "data.max_length")
"""Keys that the command line may give; what is asked, and who answers, follows from the run and the mining files."""


@dataclass(frozen=True)
class Wanted:
    data: tuple[str, ...]
    """Mining files."""
    exclude: tuple[str, ...] = ()
    """Files with questions that are kept for evaluation, beside the run's own held-out rows."""
    classes: tuple[str, ...] = FAILURES
    max_per_class: int | None = None
    edits: bool = False


@dataclass(frozen=True)
class Plan:
    folder: Path
    recipe: Recipe
    """Of the asking."""
    cases: list[Case]
    left_out: list[LeftOut]
    facts: dict
    scribe: Scribe


# ---- what is asked


def plan_pairs(run: RunDir, folder: Path, wanted: Wanted, overrides: Sequence[str], say: Callable[[str], None]) -> Plan:
    """Choose the questions, prove their gold, and write down what is asked. The model is not loaded.

    Raises RecipeError for an override, ModelError for a run without a whole export, DataError for files that cannot be read or are
    evaluation files, and when no question is left.
    """
    manifest = verify_export(run.final)
    trained_by = load(run.recipe)
    base = _settings(trained_by, run.final, folder, overrides)
    tokenizer = models.load_tokenizer(validate(Recipe, base, "harness pairs"))
    check_tokenizer(tokenizer, training_template=training_template)
    scribe = Scribe(tokenizer, training_template)

    trained, held_out = rows_of(trained_by)
    excluded = {path: load_excluded(path, say) for path in wanted.exclude}
    known = known_questions([*held_out, *(row for part in excluded.values() for row in part.rows)])
    mining = {path: load_rows(Source(path=path)) for path in wanted.data}
    names = {"data.eval": [source.path for source in trained_by.data.eval], "--exclude": list(excluded)}
    for path, part in mining.items():
        check_is_not_evaluation(path, part, names, known)
    rows = [row for part in mining.values() for row in part.rows]
    max_length = base["data"].get("max_length", trained_by.data.max_length)
    cases, left_out = select_cases(rows, known, scribe, max_length)
    say(f"{len(rows):,} rows: {len(cases):,} distinct questions whose gold is proven, {len(left_out):,} rows left out")
    if not held_out and not excluded:
        say(
            "warning: the run held nothing out and no --exclude is given, so no question is kept from the pairs; if you evaluate on rows "
            "of your own, give them with --exclude, or the evaluation is of what was trained"
        )
    if not cases:
        reasons = ", ".join(sorted({entry.reason for entry in left_out}))
        raise DataError(f"{', '.join(wanted.data)}: no question is left of {len(rows)} rows ({reasons}); give other rows with --data")
    longest = max(case.chosen_tokens for case in cases)
    recipe = _asking_recipe(base, longest, max_length, tokenizer)
    _write_questions(folder, cases, recipe)
    seen = {content_digest(asked) for row in trained if (asked := asked_of(row.row))}
    facts = {
        "run": str(run.path),
        "model": str(run.final),
        "export_digest": hashlib.sha256(json.dumps(manifest["files"], sort_keys=True).encode()).hexdigest()[:32],
        "step": manifest["step"],
        "base": manifest["base"],
        "recipe_digest": manifest["recipe_digest"],
        "data": {path: data_fingerprint(part.rows) for path, part in mining.items()},
        "excluded": {path: data_fingerprint(part.rows) for path, part in excluded.items()},
        "held_out_rows": len(held_out),
        "rows": len(rows),
        "questions_trained_on": sum(case.key in seen for case in cases),
        "seed": recipe.data.seed,
        "generate": recipe.generate.model_dump(mode="json"),
        "classes_wanted": list(wanted.classes),
        "max_per_class": wanted.max_per_class,
        "edits": wanted.edits,
    }
    return Plan(folder, recipe, cases, left_out, facts, scribe)


def rows_of(recipe: Recipe) -> tuple[list[SourceRow], list[SourceRow]]:
    """(trained, held out) rows of a run. Raises RecipeError for one that writes no answers."""
    if recipe.task == "reward":
        raise RecipeError("task = reward; such a model scores answers and writes none; give the run whose answers are to be mined")
    data, kind = recipe.data, KIND_OF_ROWS.get(recipe.task, "samples")
    asks = recipe.task in ASK_ONLY
    loaded = [load_rows(source, data.on_error, kind=kind, asks=asks) for source in data.train]
    mixture = mix(data.train, loaded, seed=data.seed, eval_fraction=data.eval_fraction, eval_rows=data.eval_rows)
    held_out = [load_rows(source, data.on_error, kind=kind, asks=asks) for source in data.eval]
    return mixture.train, mixture.held_out or mix(data.eval, held_out, seed=data.seed).train


def load_excluded(path: str, say: Callable[[str], None]) -> LoadedRows:
    """Questions with or without an answer; what is neither is said, for it keeps nothing out."""
    loaded = load_rows(Source(path=path), "skip", asks=True)
    if loaded.skipped:
        first = loaded.skipped[0]
        say(f"warning: {len(loaded.skipped):,} rows of --exclude {path} keep nothing out; the first: {first.location}: {first.reason}")
    return loaded


def check_is_not_evaluation(path: str, rows: LoadedRows, names: dict[str, list[str]], known: Overlap) -> None:
    """Raises DataError for a mining file that is an evaluation file: by its path, or because evaluation has every question of it."""
    for what, paths in names.items():
        if any(Path(resolve(path)).expanduser().resolve() == Path(resolve(other)).expanduser().resolve() for other in paths):
            raise DataError(f"--data {path}: is an evaluation file ({what}); pairs of it would spoil what it measures; give other rows")
    questions = [asked for row in rows.rows if (asked := asked_of(row.row))]
    if questions and all(words_of(asked) in known for asked in questions):
        raise DataError(
            f"--data {path}: each of its {len(questions)} questions is one that is held out for evaluation; pairs of it would spoil what "
            "they measure; give other rows"
        )


def _settings(trained_by: Recipe, final: Path, folder: Path, overrides: Sequence[str]) -> dict:
    model = trained_by.model.model_dump(mode="json", include={"dtype", "quantization", "trust_remote_code"})
    settings = {
        "task": "generate",
        "model": {"name_or_path": str(final), **model},
        "data": {"train": [{"path": str(folder / QUESTIONS)}], "on_error": "skip", "too_long": "drop_row", "seed": trained_by.data.seed},
        "generate": {},
        "output_dir": str(folder / ANSWERS),
    }
    for override in overrides:
        if not override.startswith(MAY_BE_SET):
            raise RecipeError(
                f"{override}: harness pairs takes keys of `generate`, and {', '.join(MAY_BE_SET[1:])}; the rest follows from the run"
            )
        apply_override(settings, override)
    return settings


def _asking_recipe(settings: dict, longest_gold: int, max_length: int, tokenizer) -> Recipe:
    # Whoever writes twice as much as the longest gold has not made the call.
    generate = {"max_new_tokens": max(LEAST_TOKENS, 2 * longest_gold)} | settings["generate"]
    # Question and gold fit into max_length; a wrong answer may need more than the gold leaves, as far as the model goes.
    room = min(max_length + generate["max_new_tokens"], max(tokenizer.model_max_length, max_length))
    settings = settings | {"generate": generate, "data": settings["data"] | {"max_length": room}}
    recipe = validate(Recipe, settings, "harness pairs")
    if problems := check_rules(recipe):
        raise RecipeError("\n".join(f"harness pairs: {problem}" for problem in problems))
    return recipe


def _write_questions(folder: Path, cases: Sequence[Case], recipe: Recipe) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with committing(folder / QUESTIONS) as stream:
        _write(stream, (case.question for case in cases))
    write_text_atomically(folder / ASKING, render_recipe(recipe))


def _write(stream, rows) -> None:
    for row in rows:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")


# ---- asking, and mining


def ask(folder: Path, worker: Worker, *, stop: Callable[[], str | None], say: Callable[[str], None]) -> dict:
    """What the model says to each question of a folder that plan_pairs has made, by its key; what is there already is not asked again.
    Raises as tasks.generate.answer_prompts."""
    return ask_prompts(load(folder / ASKING), worker, stop=stop, say=say)


def save_pairs(plan: Plan, said: dict, wanted: Wanted) -> dict:
    """Mine, and write pairs.jsonl and what goes with it; returns the report."""
    mined = mine(
        plan.cases,
        said,
        plan.scribe,
        seed=plan.recipe.data.seed,
        classes=wanted.classes,
        max_per_class=wanted.max_per_class,
        edits=wanted.edits,
    )
    left_out = [*plan.left_out, *mined.left_out]
    report = report_of(mined, left_out, plan.facts)
    with committing(plan.folder / LEFT_OUT) as stream:
        _write(stream, (vars(entry) for entry in left_out))
    write_text_atomically(plan.folder / REPORT, json.dumps(report, indent=1) + "\n")
    with committing(plan.folder / PAIRS) as stream:
        _write(stream, (pair.row() for pair in mined.pairs))
    return report


def check_has_pairs(report: dict, folder: Path) -> None:
    """Raises EvaluationError when nothing was mined."""
    if report["pairs"]:
        return
    if report["right"] == report["answers"]:
        raise EvaluationError(
            f"{folder / PAIRS}: no pair: all {report['answers']} answers are right; give harder questions with --data, draw several "
            "answers (generate.temperature, generate.samples_per_prompt), or make negatives of the gold with --edits"
        )
    raise EvaluationError(f"{folder / PAIRS}: no pair of {report['answers']} answers; {LEFT_OUT} beside it says why of each that failed")
