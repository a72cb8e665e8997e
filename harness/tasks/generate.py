"""Sequence-level distillation's first half: a teacher answers prompts, and its valid answers become rows that `task: sft` trains on.

<output_dir>/
  generate.json            what decides the answers: model, tokenizer, prompts, settings; every worker must find its own there
  units/unit-00000.jsonl   what the model said, word for word: {"prompt": key, "sample": n, "said": text, "ended": bool, "tokens": n}
  answers.jsonl            {"prompt": [messages], "completion": [one assistant message], "tools": [...]?}: only the answer is trained
  dropped.jsonl            {"location", "kind", "reason", "sample"?, "said"?}: rows that were not asked, and answers that are not valid
  report.json              how many of each

Promises. A unit is there and whole or not there, so that a kill costs one unit and any number of workers may share the rest. The same
recipe on the same hardware writes the same bytes: units, and the batches in them, follow from the prompts alone, and draws from the seed
and the unit. answers.jsonl comes last, when all units are there, and is made from them without the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from harness import model as models
from harness.data.prepare import tokenizer_digest
from harness.data.prompts import Prompt, Prompts, load_prompts
from harness.data.templates import check_tokenizer, end_of_turn_ids
from harness.embedded import resolve
from harness.errors import TeacherError
from harness.evaluate.generate import generate
from harness.recipe import Recipe
from harness.teacher.forecast import clock
from harness.teacher.resident import load_frozen, weights_digest
from harness.tools import FAULTS, Fault, read_answer
from harness.units import Worker, claim, committing, each_missing, missing_units

FORMAT = 1
HEADER, ANSWERS, DROPPED, REPORT = "generate.json", "answers.jsonl", "dropped.jsonl", "report.json"
UNITS, UNIT_FILE = "units", "unit-{:05d}.jsonl"


@dataclass(frozen=True)
class Said:
    """One answer, as a unit keeps it."""

    prompt: str
    """Its key."""
    sample: int
    said: str
    ended: bool
    tokens: int


def answer_prompts(recipe: Recipe, worker: Worker, *, stop: Callable[[], str | None], say: Callable[[str], None]) -> Path:
    """Do units until all are there, and make answers.jsonl of them; returns its path.

    stop: asked between two units; a reason ends the work. Raises Stopped then, DataError for prompts, ModelError for a model that cannot
    be loaded, TeacherError for a folder that is another's or cannot be written, and when no answer is valid.
    """
    work = _begin(recipe, say)
    folder = work.folder
    with _writing(folder):
        if not (folder / ANSWERS).is_file():
            work.run(worker, stop)
            work.assemble()
    report = json.loads((folder / REPORT).read_text())
    say(render_report(report))
    if not report["answers"]:
        raise TeacherError(f"{folder / ANSWERS}: none of {report['asked']} answers is valid; {DROPPED} beside it says why of each")
    say(f"complete: {folder / ANSWERS}")
    return folder / ANSWERS


def ask_prompts(recipe: Recipe, worker: Worker, *, stop: Callable[[], str | None], say: Callable[[str], None]) -> dict[str, list[Said]]:
    """Do units until all are there, and return what was said to each prompt, by its key; nothing is judged. Raises as answer_prompts."""
    work = _begin(recipe, say)
    with _writing(work.folder):
        work.run(worker, stop)
    return {prompt.key: said for prompt, said in work.by_prompt()}


def _begin(recipe: Recipe, say: Callable[[str], None]) -> _Work:
    """The work in its folder, which is this recipe's from here on."""
    folder = Path(recipe.output_dir).expanduser().resolve()
    tokenizer = models.load_tokenizer(recipe)
    check_tokenizer(tokenizer)
    asked = load_prompts(recipe.data, tokenizer, recipe.generate.max_new_tokens)
    work = _Work(recipe, tokenizer, asked, folder, say)
    say(work.describe())
    with _writing(folder):
        facts = facts_of(recipe, tokenizer, asked)
        claim(folder / HEADER, facts, verb="generate", whose="this recipe", option="output_dir", error=TeacherError)
        (folder / UNITS).mkdir(exist_ok=True)
    return work


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TeacherError(
            f"{folder}: cannot be written: {error.strerror}; free some space or make it writable: what is committed stays, and the same "
            "command goes on"
        ) from error


# ---- the folder


def facts_of(recipe: Recipe, tokenizer, asked: Prompts) -> dict:
    """Everything that decides what is answered. A model of the hub counts by its name and revision, one in a folder by its weights."""
    model, source = recipe.model, Path(resolve(recipe.model.name_or_path))
    settings = recipe.generate.model_dump(mode="json", exclude={"batch_rows", "device_map"})
    of_model = model.model_dump(mode="json", include={"revision", "dtype", "quantization"})
    return {
        "format": FORMAT,
        "model": str(source.resolve() if source.is_dir() else source),
        "model.weights": weights_digest(source) if source.is_dir() else None,
        **{f"model.{key}": value for key, value in of_model.items()},
        "tokenizer": tokenizer_digest(tokenizer),
        "prompts": hashlib.sha256("".join(prompt.key for prompt in asked.prompts).encode()).hexdigest()[:32],
        **{f"generate.{key}": value for key, value in settings.items()},
        "data.seed": recipe.data.seed if recipe.generate.temperature else None,
    }


# ---- units


@dataclass(frozen=True)
class _Work:
    recipe: Recipe
    tokenizer: object
    asked: Prompts
    folder: Path
    say: Callable[[str], None]

    @property
    def units(self) -> int:
        return -(-len(self.asked.prompts) // self.recipe.generate.unit_rows)

    def prompts_of(self, unit: int) -> list[Prompt]:
        rows = self.recipe.generate.unit_rows
        return self.asked.prompts[unit * rows : (unit + 1) * rows]

    def describe(self) -> str:
        samples = self.recipe.generate.samples_per_prompt
        each = f", {samples} answers each" if samples > 1 else ""
        return f"generate: {len(self.asked.prompts):,} distinct prompts of {self.asked.rows:,} rows{each}, in {self.units:,} units"

    def missing(self) -> set[int]:
        return missing_units(self.folder / UNITS, UNIT_FILE, self.units)

    def run(self, worker: Worker, stop: Callable[[], str | None]) -> None:
        """Unit after unit. Raises Stopped when it was told to stop before all units are there."""
        found = self.missing()
        if not found:
            return
        model, begun = self._load(), time.monotonic()
        for unit in each_missing(worker, self.units, self.missing, stop):
            started = time.monotonic()
            tokens = self._do(unit, model)
            took_s, left = time.monotonic() - started, len(self.missing())
            pace_s = (time.monotonic() - begun) / max(1, len(found) - left)
            rest = f"about {clock(left * pace_s)} left" if left else "all are there"
            self.say(
                f"unit {unit}: {tokens:,} tokens in {took_s:.1f} s ({tokens / max(took_s, 1e-9):,.0f} tokens/s); {self.units - left} of "
                f"{self.units} units, {rest}"
            )

    def _load(self):
        asked = self.recipe.model
        if asked.attn_implementation == "auto":
            # What `auto` means for training may take no padded batches.
            asked = asked.model_copy(update={"attn_implementation": "sdpa"})
        model = load_frozen(self.recipe.model_copy(update={"model": asked}), self.recipe.generate.device_map).model
        models.check_vocabulary(model, self.tokenizer)
        models.check_positions(model, max(len(prompt.ids) for prompt in self.asked.prompts) + self.recipe.generate.max_new_tokens)
        models.settle_generation(model, self.tokenizer, end_of_turn_ids(self.tokenizer))
        return model

    def _do(self, unit: int, model) -> int:
        """Answer a unit's prompts and commit what was said; returns the number of tokens."""
        settings = self.recipe.generate
        wanted = [(prompt, sample) for prompt in self.prompts_of(unit) for sample in range(settings.samples_per_prompt)]
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{self.recipe.data.seed}:{unit}".encode()).digest()[:8], "little"))
        continuations = generate(
            model,
            self.tokenizer,
            [prompt.ids for prompt, _ in wanted],
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_rows,
            temperature=settings.temperature,
            top_p=settings.top_p,
        )
        with committing(self.folder / UNITS / UNIT_FILE.format(unit)) as stream:
            for (prompt, sample), continuation in zip(wanted, continuations, strict=True):
                # With special tokens: Llama and Mistral mark calls by them.
                said = self.tokenizer.decode(continuation.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
                _write(stream, asdict(Said(prompt.key, sample, said, continuation.ended, len(continuation.ids))))
        return sum(len(continuation.ids) for continuation in continuations)

    # ---- what became of them

    def assemble(self) -> None:
        """answers.jsonl, dropped.jsonl and report.json of all units. Raises TeacherError for a unit that is not whole."""
        counts, control_tokens = Counter(), self.tokenizer.all_special_tokens
        with committing(self.folder / ANSWERS) as answers, committing(self.folder / DROPPED) as dropped:
            for row in self.asked.left_out:
                _write(dropped, {"location": row.location, "kind": "not_asked", "reason": row.reason})
            for prompt, samples in self.by_prompt():
                kept = set()
                for said in samples:
                    counts["tokens"] += said.tokens
                    answer = read_answer(said.said, prompt.row.get("tools", []), ended=said.ended, control_tokens=control_tokens)
                    if isinstance(answer, Fault):
                        counts[answer.kind] += 1
                        _write(dropped, {"location": prompt.location, **asdict(answer), "sample": said.sample, "said": said.said})
                    # As text: to Python 1 is True.
                    elif (text := json.dumps(answer, sort_keys=True)) not in kept:
                        kept.add(text)
                        counts["with_calls"] += "tool_calls" in answer
                        tools = {"tools": prompt.row["tools"]} if "tools" in prompt.row else {}
                        _write(answers, {"prompt": prompt.row["messages"], "completion": [answer], **tools})
                counts["asked"] += len(samples)
                counts["answers"] += len(kept)
            report = {
                "rows": self.asked.rows,
                "not_asked": len(self.asked.left_out),
                "prompts": len(self.asked.prompts),
                **{key: counts[key] for key in ("asked", "tokens", "answers", "with_calls")},
                "repeated": counts["asked"] - counts["answers"] - sum(counts[kind] for kind in FAULTS),
                "dropped": {kind: counts[kind] for kind in FAULTS if counts[kind]},
            }
            with committing(self.folder / REPORT) as stream:
                stream.write(json.dumps(report, indent=1) + "\n")

    def by_prompt(self) -> Iterator[tuple[Prompt, list[Said]]]:
        samples = self.recipe.generate.samples_per_prompt
        for unit in range(self.units):
            file = self.folder / UNITS / UNIT_FILE.format(unit)
            try:
                # Not splitlines, which parts at U+2028 and others that JSON leaves as they are.
                with open(file, encoding="utf-8") as stream:
                    lines = [Said(**json.loads(line)) for line in stream]
            except (ValueError, TypeError) as error:
                raise TeacherError(f"{file}: cannot be read ({error}); remove it, and the same command writes it again") from None
            prompts = self.prompts_of(unit)
            if [(said.prompt, said.sample) for said in lines] != [(prompt.key, n) for prompt in prompts for n in range(samples)]:
                raise TeacherError(f"{file}: does not hold the answers to its prompts; remove it, and the same command writes it again")
            for at, prompt in enumerate(prompts):
                yield prompt, lines[at * samples : (at + 1) * samples]


def _write(stream, row: dict) -> None:
    stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def render_report(report: dict) -> str:
    dropped, asked = sum(report["dropped"].values()), max(report["asked"], 1)
    kinds = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in report["dropped"].items())
    lines = [
        f"{report['answers']:,} answers to {report['prompts']:,} prompts, {report['with_calls']:,} of them call a tool; "
        f"{report['tokens'] / asked:,.0f} tokens each",
        f"dropped {dropped:,} of {report['asked']:,} as invalid ({dropped / asked:.1%})" + (f": {kinds}" if kinds else ""),
    ]
    if report["repeated"]:
        lines.append(f"{report['repeated']:,} were the same answer to the same prompt again")
    if report["not_asked"]:
        lines.append(f"{report['not_asked']:,} rows were not asked")
    return "\n".join(lines)
