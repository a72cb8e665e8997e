"""An evaluation: suites' items answered by one target, judged, and summed up by category.

<output>/
  evaluate.json            what decides the answers: target, items, settings; every worker must find its own there
  units/unit-00000.jsonl   what was said, word for word: {"suite", "id", "said", "prompt_tokens", "answer_tokens", …} (answering.Said)
  items.jsonl              a row for each item, judged (harness.evaluate.report)
  summary.json             the numbers, category by category
  comparison.json          against another evaluation, when one was named

Promises. A unit is there and whole or not there (harness.units): a kill costs one unit, and any number of workers, on any machines, may
share the rest. Which items there are and which batch each is in follows from their content alone. items.jsonl and summary.json come last,
when all units are there, and are made of them without the model, so that a judge that was mended judges again what was said.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from harness import __version__
from harness.data.rows import content_digest
from harness.errors import DataError, EvaluationError, RecipeError
from harness.evaluate.items import Item
from harness.evaluate.report import ITEMS, SUMMARY, by_category, load_results, summarise_category
from harness.evaluate.suites import Loaded, Verdict, find_suite
from harness.model.export import digest_file
from harness.run import git_commit, library_versions
from harness.tasks.answering import Connection, Local, Said, Served, Settings, check_api_can, is_served
from harness.teacher.forecast import clock
from harness.units import Worker, claim, committing, each_missing, missing_units

FORMAT = 1
HEADER = "evaluate.json"
FROM_FOLDERS = ("bfcl", "apibench")
UNITS, UNIT_FILE = "units", "unit-{:05d}.jsonl"


@dataclass(frozen=True)
class Asked:
    """A suite and what is asked of it."""

    name: str
    suite: ModuleType
    loaded: Loaded
    items: list[Item]
    """Those that were chosen, the longest last, so that a batch's are of like length."""


def load_suites(wanted: Sequence[tuple[str, list[Path]]], settings: Settings) -> list[Asked]:
    """Each suite once, with the files of all its mentions. Raises RecipeError for an unknown one, DataError for what is wrong in a file."""
    paths: dict[str, list[Path]] = {}
    for name, files in wanted:
        find_suite(name)
        paths.setdefault(name, []).extend(files)
    asked = []
    for name, files in paths.items():
        suite = find_suite(name)
        for file in files:
            if not file.exists():
                raise RecipeError(f"--suite {name}={file}: there is no such file or folder")
            if file.is_dir() and name not in FROM_FOLDERS:
                raise RecipeError(f"--suite {name}={file}: is a folder; give its files, with a comma between them")
        loaded = suite.load(files, underscore_names=settings.underscore_names)
        if not loaded.items:
            raise DataError(f"--suite {name}={','.join(map(str, files))}: holds nothing that could be asked")
        id, times = Counter(item.id for item in loaded.items).most_common(1)[0]
        if times > 1:
            raise DataError(f"--suite {name}={','.join(map(str, files))}: {id} is there {times} times; each question counts once")
        asked.append(Asked(name, suite, loaded, choose_items(loaded.items, settings.max_items)))
    return asked


def choose_items(items: Sequence[Item], most: int | None) -> list[Item]:
    """At most so many of each category, by their content: the same ones in any order of the files, and of two sizes the smaller in the
    larger."""
    chosen: dict[str, list[Item]] = {}
    for item in sorted(items, key=lambda item: (key_of(item), item.id)):
        of_category = chosen.setdefault(item.category, [])
        if most is None or len(of_category) < most:
            of_category.append(item)
    return sorted((item for some in chosen.values() for item in some), key=lambda item: (_length(item), item.id))


def key_of(item: Item) -> str:
    """What is asked, as a digest."""
    return content_digest({"messages": item.messages, "tools": item.tools} | ({"row": item.gold["row"]} if "row" in item.gold else {}))


def _length(item: Item) -> int:
    return len(json.dumps([item.messages, item.tools, item.gold.get("row")], ensure_ascii=False))


# ---- the work


def evaluate(
    target: str,
    wanted: Sequence[tuple[str, list[Path]]],
    settings: Settings,
    output: Path,
    worker: Worker,
    *,
    connection: Connection,
    stop: Callable[[], str | None],
    say: Callable[[str], None],
) -> dict:
    """Do units until all are there, judge them, and return the summary.

    stop: asked between two units; a reason ends the work. Raises Stopped then, RecipeError and DataError for what is asked, ModelError for
    a model that cannot be loaded, EvaluationError for a suite that the target cannot answer and an output that is another's.
    """
    asked = load_suites(wanted, settings)
    if is_served(target):
        # Before the server is waited for.
        for one in asked:
            try:
                check_api_can(target, one.suite.NEEDS)
            except EvaluationError as error:
                raise EvaluationError(f"--suite {one.name}: {error}") from None
        who = Served(target, settings, connection)
    else:
        who = Local(target, settings)
        for one in asked:
            who.check_can(one.suite.NEEDS, one.items)
    work = _Work(asked, who, settings, output, say)
    say(work.describe())
    try:
        claim(output / HEADER, work.facts(), verb="evaluate", whose="this command", option="--output", error=EvaluationError)
        (output / UNITS).mkdir(exist_ok=True)
        work.run(worker, stop)
        return work.assemble()
    except OSError as error:
        raise EvaluationError(
            f"{output}: cannot be written: {error.strerror}; free some space or make it writable: what is committed stays, and the same "
            "command goes on"
        ) from error


@dataclass(frozen=True)
class _Work:
    asked: list[Asked]
    who: Local | Served
    settings: Settings
    output: Path
    say: Callable[[str], None]

    def batches(self) -> list[tuple[Asked, list[Item]]]:
        """One for each unit."""
        size = self.settings.batch_size
        return [(one, one.items[start : start + size]) for one in self.asked for start in range(0, len(one.items), size)]

    def facts(self) -> dict:
        """Everything that decides what is answered and judged."""
        facts = {"format": FORMAT} | {f"target.{name}": value for name, value in self.who.identity.items()}
        facts |= {f"settings.{name}": value for name, value in asdict(self.settings).items()}
        for one in self.asked:
            told = "".join(f"{item.id} {item.category} {key_of(item)}\n" for item in one.items)
            files = sorted(digest_file(file) for file in one.loaded.files)
            facts[f"suite.{one.name}"] = [len(one.items), hashlib.sha256("".join([told, *files]).encode()).hexdigest()[:32]]
        return facts

    def describe(self) -> str:
        suites = ", ".join(f"{len(one.items):,} of {one.name}" for one in self.asked)
        return f"evaluate: {suites}, in {len(self.batches()):,} units"

    def missing(self) -> set[int]:
        return missing_units(self.output / UNITS, UNIT_FILE, len(self.batches()))

    def run(self, worker: Worker, stop: Callable[[], str | None]) -> None:
        batches, found, begun = self.batches(), len(self.missing()), time.monotonic()
        for unit in each_missing(worker, len(batches), self.missing, stop):
            asked, items = batches[unit]
            started = time.monotonic()
            seed = int.from_bytes(hashlib.sha256(f"{self.settings.seed}:{unit}".encode()).digest()[:4], "little") >> 1
            said = self.who.answer(asked.suite.NEEDS, items, seed)
            with committing(self.output / UNITS / UNIT_FILE.format(unit)) as stream:
                for item, one in zip(items, said, strict=True):
                    _write(stream, {"suite": asked.name, "id": item.id, **asdict(one)})
            left, tokens = len(self.missing()), sum(one.answer_tokens for one in said)
            pace_s = (time.monotonic() - begun) / max(1, found - left)
            rest = f"about {clock(left * pace_s)} left" if left else "all are there"
            self.say(
                f"unit {unit}: {len(items)} of {asked.name}, {tokens:,} tokens in {time.monotonic() - started:.1f} s; "
                f"{len(batches) - left} of {len(batches)} units, {rest}"
            )

    # ---- what became of them

    def assemble(self) -> dict:
        """items.jsonl and summary.json of all units. Raises EvaluationError for a unit that is not whole, and for a suite that nobody could
        be asked."""
        rows: dict[str, list[dict]] = {one.name: [] for one in self.asked}
        for unit, (asked, items) in enumerate(self.batches()):
            for item, said in zip(items, self._read(unit, asked, items), strict=True):
                rows[asked.name].append(_row(asked, item, said))
        for name, of_suite in rows.items():
            vain = [row for row in of_suite if row["failure"] in ("too_long", "refused")]
            if len(vain) == len(of_suite):
                first = vain[0]
                remedy = "; a lower --max-new-tokens leaves more to the questions (with another --output)"
                raise EvaluationError(
                    f"--suite {name}: not one of {len(vain)} items could be asked; the first: {first['detail']}"
                    f"{remedy if first['failure'] == 'too_long' else ''}"
                )
        summary = self._summary(rows)
        with committing(self.output / ITEMS) as stream:
            for of_suite in rows.values():
                for row in sorted(of_suite, key=lambda row: (row["category"], row["id"])):
                    _write(stream, row)
        with committing(self.output / SUMMARY) as stream:
            stream.write(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        return summary

    def _read(self, unit: int, asked: Asked, items: Sequence[Item]) -> list[Said]:
        file = self.output / UNITS / UNIT_FILE.format(unit)
        try:
            # Not splitlines, which parts at U+2028 and others that JSON leaves as they are.
            with open(file, encoding="utf-8") as stream:
                lines = [json.loads(line) for line in stream]
            named = [(line.pop("suite"), line.pop("id")) for line in lines]
            said = [Said(**line) for line in lines]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise EvaluationError(f"{file}: cannot be read ({error}); remove it, and the same command writes it again") from None
        if named != [(asked.name, item.id) for item in items]:
            raise EvaluationError(f"{file}: does not hold the answers to its items; remove it, and the same command writes it again")
        return said

    def _summary(self, rows: dict[str, list[dict]]) -> dict:
        suites = {
            one.name: {
                "note": one.suite.NOTE,
                "needs": one.suite.NEEDS,
                "files": {str(file): digest_file(file) for file in one.loaded.files},
                "left_out": one.loaded.left_out,
                "not_chosen": len(one.loaded.items) - len(one.items),
                "categories": {name: summarise_category(found) for name, found in sorted(by_category(rows[one.name]).items())},
            }
            for one in self.asked
        }
        return {
            "target": self.who.identity,
            "settings": asdict(self.settings),
            "harness": __version__,
            "git_commit": git_commit(),
            "versions": library_versions(),
            "suites": suites,
        }


def _row(asked: Asked, item: Item, said: Said) -> dict:
    if asked.suite.NEEDS == "loss":
        correct, verdict = None, Verdict(said.failure, said.detail)
    else:
        verdict = Verdict(said.failure, said.detail) if said.failure else asked.suite.judge(item, said.said)
        correct = verdict.failure is None
    row = {"suite": asked.name, "id": item.id, "category": item.category, "correct": correct, "failure": verdict.failure}
    row |= {"detail": verdict.detail, "measures": verdict.measures, "key": key_of(item)}
    more = {name: value for name, value in asdict(said).items() if name not in ("failure", "detail")}
    return row | more


def _write(stream, row: dict) -> None:
    # Half of a surrogate pair, which a model may write by its escape, stays that escape: UTF-8 has no such character.
    stream.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n")


def save_comparison(output: Path, against: Path) -> dict:
    """comparison.json of two evaluations, and what stands in it."""
    from harness.evaluate.report import compare

    found = compare(load_results(output), load_results(against))
    with committing(output / "comparison.json") as stream:
        stream.write(json.dumps(found, indent=1) + "\n")
    return found
