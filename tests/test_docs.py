"""What README.md and docs/ say is true: every command in them runs, and one that cannot run here is checked as far as it can be.

A block of bash, sh or python is run, in its page's order, in a folder that looks like a checkout. A comment right before a block says
what is special about it:

    <!-- not run here: needs 8 GPUs -->   its commands are read instead: recipes resolve; verbs, options, files and make targets exist
    <!-- slow -->                         run by `make test-slow`
    <!-- slurm -->                        run there too, with a real Slurm of three nodes (tests/slurm/rig.py)
    <!-- cluster -->                      YAML that is a cluster file, or a part of one
    <!-- decision -->                     YAML that is a file of `harness decide`
    <!-- exits with 2 -->                 how its last command ends (0 without this)
    <!-- file: mine.yaml -->              is saved under this name for the page's commands; so is YAML that begins with `# mine.yaml`
    <!-- output -->                       what the commands before it print, line by line; … stands for anything
    6.1 s<!-- figure: sft-cpu.json a.b --> in the text: a measured figure, and where it stands in benchmarks/results/

In a block without a language, lines that begin with `$ ` are run as well, and the others are what they print.

`python tests/test_docs.py` writes the tables of fields in docs/recipe.md and docs/slurm.md from the schemas.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path

import pytest
from conftest import REPOSITORY, Finished, run_command
from pydantic import BaseModel
from slurm.conftest import shared_rig
from slurm.rig import why_not

from harness.cli import VERBS, group
from harness.cli.arguments import load_recipe
from harness.cluster.pipeline import find_pipeline, load_pipeline
from harness.cluster.schema import Cluster, load_cluster
from harness.evaluate.decision.schema import Decision, load_decision
from harness.launcher import Machines, plan_launch
from harness.overrides import dashed_overrides
from harness.recipe import Recipe, load
from harness.recipe.backend import load_backend

README = REPOSITORY / "README.md"
DOCS = REPOSITORY / "docs"
RUN_LANGUAGES = ("bash", "sh", "python")
SHOWN_LANGUAGES = ("yaml", "json", "jsonl", "text", "")
MINUTES_OR_NETWORK = ("make", "pip", "git", "hf", "apt-get", "sudo")
"""Programs whose blocks must be marked as not run here."""
UNCHECKED = ("vllm", "transformers", "pip", "git", "hf", "wandb", "cd", "source", ".", "export", "ls", "cat", "tail")
"""Other people's programs, whose arguments nothing here can judge."""


# ---- reading the pages


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str
    marks: tuple[tuple[str, str], ...]

    def mark(self, name: str) -> str | None:
        """What a mark says, "" where it says nothing more, None where there is no such mark."""
        return dict(self.marks).get(name)

    @property
    def is_slow(self) -> bool:
        return self.mark("slow") is not None or self.needs_slurm

    @property
    def needs_slurm(self) -> bool:
        return self.mark("slurm") is not None

    @property
    def file(self) -> str | None:
        """The name under which the block is saved."""
        named = re.match(r"# ([\w-]+\.yaml)\n", self.text) if self.language == "yaml" else None
        return self.mark("file") or (named and named.group(1))

    @property
    def is_session(self) -> bool:
        return self.language in ("", "text") and self.mark("output") is None and self.text.startswith("$ ")

    @property
    def runs(self) -> bool:
        return (self.language in RUN_LANGUAGES or self.is_session) and self.mark("not run here") is None


def pages() -> list[str]:
    return [path.relative_to(REPOSITORY).as_posix() for path in (README, *sorted(DOCS.glob("*.md"))) if path.is_file()]


def read_marks(lines: list[str]) -> tuple[tuple[str, str], ...]:
    """Of the comments that these lines end with: (name, what it says)."""
    comments = takewhile(bool, (re.fullmatch(r"\s*<!-- (.*) -->\s*", line) for line in reversed(lines)))
    said = [comment.group(1) for comment in comments]
    return tuple((part[0], part[1]) for part in (re.match(r"(exits with|[^:]*):?\s*(.*)", text).groups() for text in said))


@cache
def blocks(page: str) -> tuple[Block, ...]:
    lines, found, at = (REPOSITORY / page).read_text(encoding="utf-8").splitlines(), [], 0
    while at < len(lines):
        opened = re.fullmatch(r"\s*```(\w*)\s*", lines[at])
        if opened:
            end = next(n for n in range(at + 1, len(lines)) if lines[n].strip() == "```")
            text = textwrap.dedent("\n".join(lines[at + 1 : end])) + "\n"
            found.append(Block(page, at + 1, opened.group(1), text, read_marks(lines[:at])))
            at = end
        at += 1
    return tuple(found)


def prose(page: str) -> str:
    """The page without its blocks, whose lines stay as empty ones."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return re.sub(r"(?ms)^\s*```.*?^\s*```\s*?$", lambda block: "\n" * block.group().count("\n"), text)


def inline_code(page: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(block: Block) -> list[str]:
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.is_session:
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


ALL_BLOCKS = [block for page in pages() for block in blocks(page)]


def marks_of(block: Block) -> list:
    return [mark for mark, holds in ((pytest.mark.slow, block.is_slow), (pytest.mark.slurm, block.needs_slurm)) if holds]


def as_parameters(chosen) -> list:
    return [pytest.param(block, id=f"{block.page}:{block.line}", marks=marks_of(block)) for block in ALL_BLOCKS if chosen(block)]


# ---- running them


class Reader:
    """Follows pages from top to bottom, each in a folder of its own; a training that stands on several pages is run once, and copied."""

    def __init__(self, root: Path):
        self.root = root
        self.followed: dict[Block, Finished] = {}
        self.trained: dict[tuple, tuple[Finished, Path]] = {}

    def folder(self, page: str) -> Path:
        folder = self.root / page.replace("/", "-")
        if not folder.is_dir():
            for name in ("configs", "launch"):
                shutil.copytree(REPOSITORY / name, folder / name)
        for block in blocks(page):
            if block.file:
                (folder / block.file).write_text(block.text, encoding="utf-8")
        return folder

    def follow(self, block: Block) -> Finished:
        """How the block's last command ended, after everything above it on the page (a fast block does not wait for slow ones)."""
        for earlier in blocks(block.page):
            if earlier.line <= block.line and earlier.runs and (block.is_slow or not earlier.is_slow) and earlier not in self.followed:
                self.followed[earlier] = self._run(earlier)
        return self.followed[block]

    def _run(self, block: Block) -> Finished:
        folder, output = self.folder(block.page), ""
        if block.language == "python":
            (folder / "block.py").write_text(block.text, encoding="utf-8")
        steps = [f"{shlex.quote(sys.executable)} block.py"] if block.language == "python" else commands(block)
        for number, step in enumerate(steps, 1):
            done = self._step(step, folder, block.page)
            output += done.output
            if done.code and number < len(steps):
                return Finished(-1, f"{output}\n`{step}` ended with {done.code}")
        return Finished(done.code, output)

    def _step(self, step: str, folder: Path, page: str) -> Finished:
        # With the files that it names, which another page may have under the same name.
        key = step, *(block.text for block in blocks(page) if block.file and block.file in step)
        if key in self.trained:
            done, kept = self.trained[key]
            shutil.copytree(kept, folder / "runs", dirs_exist_ok=True)
            return done
        before = run_folders(folder)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        slurm = {"SLURM_CONF": shared_rig("cgroup").environment["SLURM_CONF"]} if has_slurm(page) else {}
        done = run_command("bash", "-euo", "pipefail", "-c", step, cwd=folder, PATH=path, CUDA_VISIBLE_DEVICES="", **slurm)
        written = run_folders(folder) - before
        if step.startswith("harness run ") and done.code == 0 and written:
            # As it is now: what follows on the page may add to it.
            kept = self.root / f"trained-{len(self.trained)}"
            for name in written:
                shutil.copytree(folder / "runs" / name, kept / name)
            self.trained[key] = done, kept
        return done


def has_slurm(page: str) -> bool:
    """Whether this page's commands are to find a Slurm: some need one, and it is installed."""
    return any(block.needs_slurm for block in blocks(page)) and why_not("cgroup") is None


def run_folders(folder: Path) -> set[str]:
    return {path.name for path in (folder / "runs").glob("*")}


@pytest.fixture(scope="session")
def reader(tmp_path_factory, cache):
    return Reader(tmp_path_factory.mktemp("reader"))


@pytest.mark.parametrize("block", as_parameters(lambda block: block.runs))
def test_every_command_and_program_on_a_page_runs(reader, block):
    for command in commands(block) if block.language != "python" else []:
        program = shlex.split(command, comments=True)[0]
        assert program not in MINUTES_OR_NETWORK, f"{block.page}:{block.line}: mark this block `<!-- not run here: … -->`: {command}"
    done = reader.follow(block)
    if block.is_session:
        check_output(block, done.output)
        return
    assert done.code == int(block.mark("exits with") or 0), done.output
    following = [other for other in blocks(block.page) if other.line > block.line][:1]
    for shown in following:
        if shown.mark("output") is not None:
            check_output(shown, done.output)


def check_output(shown: Block, output: str) -> None:
    """Every line that the page shows was printed, in this order."""
    printed = iter(output.splitlines())
    for line in [line for line in shown.text.splitlines() if line.strip() and not line.startswith("$ ")]:
        pattern = ".*".join(re.escape(part.strip()) for part in line.split("…"))
        assert any(re.search(pattern, candidate) for candidate in printed), f"{shown.page}:{shown.line}: not printed: {line}\n{output}"


# ---- reading commands that are not run


@pytest.mark.parametrize("block", as_parameters(lambda block: block.mark("not run here") is not None))
def test_a_command_that_is_not_run_says_why_and_would_be_accepted(reader, block, monkeypatch):
    assert block.mark("not run here"), "say why it is not run"
    monkeypatch.chdir(reader.folder(block.page))
    if block.language == "python":
        compile(block.text, block.page, "exec")
        return
    for command in commands(block):
        for part in re.split(r"\s(?:&&|\|\||\||;)\s", command):
            check_command(part)


def check_command(command: str) -> None:
    """Raises unless what the command names exists and its recipe resolves; nothing is started."""
    words, environment = shlex.split(command, comments=True), {}
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, environment[name] = words.pop(0).partition("=")
    program, arguments = words[0], words[1:]
    if any(word.endswith("launch/train.py") for word in words):
        check_rank_command(words)
    elif program == "harness":
        check_harness_command(arguments, environment)
    elif any(word.endswith("launch/evaluate.py") for word in words):
        assert program in ("accelerate", "torchrun", "python"), command
        at = next(n for n, word in enumerate(words) if word.endswith("launch/evaluate.py"))
        check_harness_command(["evaluate", *words[at + 1 :]], environment)
    elif program.endswith("launch/multi-node.sh"):
        assert os.access(REPOSITORY / "launch" / "multi-node.sh", os.X_OK)
        check_harness_command(["run", *arguments], environment)
    elif program == "make":
        targets = re.findall(r"(?m)^([\w-]+):", (REPOSITORY / "Makefile").read_text())
        assert set(arguments) <= set(targets), f"{command}: the Makefile has {targets}"
    elif program in ("python", "python3", ".venv/bin/python") and arguments[:1] == ["-m"]:
        assert importlib.util.find_spec(arguments[1]), command
    elif program in ("python", "python3", "pytest"):
        assert all((REPOSITORY / word).exists() for word in arguments if "/" in word and not word.startswith(("-", "/"))), command
    else:
        assert program in UNCHECKED, f"{command}: say in tests/test_docs.py how this is checked"


def check_harness_command(arguments: list[str], environment: dict[str, str]) -> None:
    if not arguments or arguments[0] in ("--help", "--version"):
        return
    assert arguments[0] in VERBS, f"there is no verb {arguments[0]}"
    verb = group.get_command(None, arguments[0])
    if "--help" in arguments:
        return
    context = verb.make_context(arguments[0], list(arguments[1:]))
    given = context.params
    if given.get("recipe") is None:
        return
    if arguments[0] == "decide":
        load_decision(given["recipe"], dashed_overrides(list(given["overrides"])))
        return
    if arguments[0] in ("run", "submit", "fetch") and (pipeline := find_pipeline(given["recipe"])):
        load_pipeline(pipeline, given["overrides"])
        return
    backend = [f"backend={given['backend']}"] if given.get("backend") else []
    with context.scope(cleanup=False):
        recipe = load_recipe(given["recipe"], (*given["overrides"], *backend))
    if arguments[0] == "run" and load_backend(recipe.backend).kind != "single":
        plan_launch(recipe, Machines.from_environment(given["processes"] or 1, environment), [])


def check_rank_command(words: list[str]) -> None:
    """accelerate launch, torchrun, deepspeed or python with launch/train.py."""
    from harness.rank import parse_arguments

    at = next(n for n, word in enumerate(words) if word.endswith("launch/train.py"))
    assert words[0] in ("accelerate", "torchrun", "deepspeed", "python"), words[0]
    if "--config_file" in words[:at]:
        load_backend(words[words.index("--config_file") + 1])
    options = parse_arguments(words[at + 1 :])
    load(options.recipe, dashed_overrides(options.overrides))


# ---- what stands in the text and in blocks that are shown


@pytest.mark.parametrize("page", pages())
def test_no_command_hides_in_a_block_that_is_not_run(page):
    for block in blocks(page):
        assert block.language in RUN_LANGUAGES + SHOWN_LANGUAGES, f"{page}:{block.line}: {block.language} blocks are not run; use bash"
        if block.language not in RUN_LANGUAGES and not block.is_session and block.mark("output") is None:
            hidden = re.findall(r"(?m)^\s*(?:\$ |(?:harness|make|accelerate|torchrun|deepspeed) \w).*", block.text)
            assert not hidden, f"{page}:{block.line}: {hidden}"


@pytest.mark.parametrize("block", as_parameters(lambda block: block.language == "yaml"))
def test_every_yaml_block_is_a_recipe_a_pipeline_a_backend_a_cluster_or_a_part_of_one(reader, block, monkeypatch):
    from harness.cluster.pipeline import load_pipeline
    from harness.cluster.stages import plan_stages
    from harness.recipe.load import read_yaml

    monkeypatch.chdir(reader.folder(block.page))
    file = reader.folder(block.page) / (block.file or f"block-{block.line}.yaml")
    file.write_text(block.text, encoding="utf-8")
    settings = read_yaml(file)
    if "distributed_type" in settings:
        load_backend(str(file))
    elif block.mark("cluster") is not None:
        load_cluster(str(file))
    elif block.mark("decision") is not None:
        load_decision(file)
    elif "stages" in settings:
        plan_stages(load_pipeline(file))
    elif settings.keys() >= {"model", "data"}:
        load(file)
    else:
        unknown = set(dotted_keys(settings)) - fields().keys() - sections()
        assert not unknown, f"{block.page}:{block.line}: not in a recipe: {unknown}"


def dotted_keys(settings: dict, prefix: str = "") -> Iterator[str]:
    for key, value in settings.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from dotted_keys(value, f"{prefix}{key}.")


@pytest.mark.parametrize("page", pages())
def test_every_verb_option_and_key_in_the_text_exists(page):
    for code in inline_code(page):
        named = re.match(r"harness (\w+)(.*)", code)
        if named:
            assert named.group(1) in VERBS, f"{page}: `{code}`: there is no such verb"
            known = {name for parameter in group.get_command(None, named.group(1)).params for name in parameter.opts} | {"--help"}
            options = set(re.findall(r"(?<!\S)--[a-z-]+(?![\w.-])", named.group(2)))
            assert options <= known, f"{page}: `{code}`: no such option {options - known}"
        dotted = re.match(r"((?:model|data|train|checkpoint|tracking)\.[a-z][\w.]*)", code)
        if dotted and not dotted.group(1).endswith((".py", ".json", ".jsonl", ".yaml", ".parquet")):
            key = re.sub(r"^(data\.(?:train|eval))\.\d+\.", "data.train[].", dotted.group(1))
            assert key in fields().keys() | sections(), f"{page}: `{code}`: there is no such key in a recipe"


@pytest.mark.parametrize("page", pages())
def test_every_link_and_every_path_in_the_text_leads_somewhere(page):
    here = (REPOSITORY / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = here / path if path else REPOSITORY / page
        assert file.exists(), f"{page}: the link {target} leads nowhere"
        assert not anchor or anchor in anchors(file), f"{page}: {target}: no such heading"
    for code in inline_code(page):
        if re.fullmatch(r"(configs|docs|harness|launch|tests|benchmarks|slurm)/[\w./-]*\w", code):
            assert (REPOSITORY / code).exists(), f"{page}: `{code}` is not there"


def anchors(file: Path) -> set[str]:
    """What GitHub calls the headings of a page in links."""
    headings = re.findall(r"(?m)^#+ (.*)$", file.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_there_and_leads_to_every_page():
    assert README.is_file(), "README.md is missing"
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)", README.read_text(encoding="utf-8")))
    assert linked >= {f"docs/{path.name}" for path in DOCS.glob("*.md")}


# ---- figures


FIGURE = re.compile(r"(\d[\d.,]*)\s?(%?)[^\d<\n]{0,40}<!-- figure: (\S+) (\S+) -->")
CLAIM = re.compile(
    r"\d[\d.,]*\s*(?:×(?!\s*\d)|times (?:as|faster)|x faster|% (?:faster|slower|more)|tok(?:en)?s?/s|tokens per s|s(?:econds)? per step)"
)


@pytest.mark.parametrize("page", pages())
def test_a_measured_figure_stands_in_the_results_and_no_other_is_quoted(page):
    text = prose(page)
    for quoted, percent, file, key in FIGURE.findall(text):
        found = json.loads((REPOSITORY / "benchmarks" / "results" / file).read_text())
        for part in key.split("."):
            found = found[int(part)] if isinstance(found, list) else found[part]
        number = quoted.replace(",", "").rstrip(".")
        decimals = len(number.partition(".")[2])
        assert f"{found * (100 if percent else 1):.{decimals}f}" == number, f"{page}: {quoted}: {file} says {found} at {key}"
    claims = CLAIM.findall(FIGURE.sub("", text))
    assert not claims, f"{page}: {claims}: quote a measured figure with `<!-- figure: FILE KEY -->` behind it"


# ---- the tables of fields


FIELDS_BEGIN, FIELDS_END = "<!-- fields: written by `python tests/test_docs.py` -->", "<!-- end of fields -->"
TABLES = {"recipe.md": Recipe, "slurm.md": Cluster, "decide.md": Decision}
"""The pages that have such tables, and of what."""
FAMILIAR = {
    "partition": "As sbatch's `--partition`.",
    "account": "As sbatch's `--account`.",
    "qos": "As sbatch's `--qos`.",
    "reservation": "As sbatch's `--reservation`.",
    "gpus_per_node": "One rank for each.",
    "task": "What is done: supervised fine-tuning, distillation, or answers for a student.",
    "model.quantization.bnb_4bit_quant_type": "As in `BitsAndBytesConfig`.",
    "teacher.quantization.bnb_4bit_quant_type": "As in `BitsAndBytesConfig`.",
    "model.lora.r": "Rank of the adapter.",
    "model.lora.dropout": "As `lora_dropout` in `LoraConfig`.",
    "model.lora.use_rslora": "As in `LoraConfig`.",
    "model.lora.use_dora": "As in `LoraConfig`.",
    "data.train[].format": "The layout of the rows; `auto` looks at their keys.",
    "data.train[].max_rows": "At most so many rows of it, drawn by lot with `data.seed`.",
    "train.warmup_steps": "Optimiser steps over which the learning rate rises from 0.",
    "train.eval_steps": "Optimiser steps between two evaluations.",
    "train.early_stopping_threshold": "By how much the metric has to be better to count as better.",
    "tracking.project": "W&B project.",
    "tracking.entity": "W&B team or user.",
    "tracking.group": "W&B group.",
    "tracking.tags": "W&B tags.",
}
"""Meanings of keys whose names say enough in the schema itself."""


@cache
def fields(of: type[BaseModel] = Recipe) -> dict[str, tuple[dict, bool]]:
    """Dotted key -> (its JSON schema, whether it is required), for every leaf of a recipe or a cluster file; a key of a source is
    `data.train[].path`."""
    found: dict[str, tuple[dict, bool]] = {}
    schema = of.model_json_schema()

    def walk(section: dict, prefix: str) -> None:
        for name, spec in section["properties"].items():
            inner = section_in(spec)
            required = name in section.get("required", ())
            if inner is None:
                found[prefix + name] = spec, required
            elif spec.get("type") == "array":
                found[prefix + name] = spec, required
                if name in ("train", "rewards"):
                    walk(schema["$defs"][inner], f"{prefix}{name}[].")
            else:
                walk(schema["$defs"][inner], f"{prefix}{name}.")

    walk(schema, "")
    return found


def section_in(spec: dict) -> str | None:
    """The section that a field holds (or lists), by its name in $defs."""
    candidates = [spec, spec.get("items", {}), *spec.get("anyOf", ())]
    return next((candidate["$ref"].rsplit("/", 1)[-1] for candidate in candidates if "$ref" in candidate), None)


def sections() -> set[str]:
    return {key.rsplit(".", depth)[0] for key in fields() for depth in range(1, key.count(".") + 1)}


def takes(spec: dict) -> str:
    """What a field takes, in words."""
    if "anyOf" in spec:
        return ", ".join(takes(option) for option in spec["anyOf"] if option.get("type") != "null")
    if "const" in spec or "enum" in spec:
        return ", ".join(f"`{value_of(value)}`" for value in spec.get("enum", [spec.get("const")]))
    if spec.get("additionalProperties") == {"minLength": 1, "type": "string"}:
        return "names and texts: `name: text`"
    if spec.get("type") == "array":
        listed = {"Source": "sources", "RewardPart": "rewards"}
        return listed[section_in(spec)] if "$ref" in spec.get("items", {}) else f"list of {takes(spec['items'])}"
    words = {
        "integer": "whole number",
        "number": "number",
        "boolean": "`true`, `false`",
        "string": "text",
        "object": "flags: `name: value`, `name: true`",
    }[spec["type"]]
    limits = (("exclusiveMinimum", ">"), ("minimum", "≥"), ("exclusiveMaximum", "<"), ("maximum", "≤"))
    within = ", ".join(f"{sign} {spec[limit]:g}" for limit, sign in limits if limit in spec and spec[limit] < 2**32)
    return f"{words} {within}".strip()


def value_of(value) -> str:
    """As it is written in a recipe, where `no` is a word."""
    return value if isinstance(value, str) else json.dumps(value)


TITLES = {
    "": "Top level",
    "data.train[]": "`data.train[]`, `data.eval[]`: a source",
    "rlhf.rewards[]": "`rlhf.rewards[]`: a reward",
}


def render_fields(of: type[BaseModel]) -> str:
    """The tables of every key with what it takes, its default and its meaning, section by section."""
    by_section: dict[str, list[str]] = {}
    for key, (spec, required) in fields(of).items():
        section, _, leaf = key.rpartition(".")
        default = "**required**" if required else "–" if spec.get("default") is None else f"`{value_of(spec['default'])}`"
        meaning = " ".join(spec.get("description", "").split()) or FAMILIAR.get(key) or familiar(section)
        by_section.setdefault(section, []).append(f"| `{leaf}` | {takes(spec)} | {default} | {meaning} |")
    parts = []
    for section, rows in by_section.items():
        title = TITLES.get(section, f"`{section}`")
        parts.append("\n".join([f"### {title}", "", "| key | takes | default | meaning |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts)


def familiar(section: str) -> str:
    if section == "train.lr_scheduler_kwargs":
        return "As in transformers' scheduler of that name."
    assert section == "train", f"a field of {section} has neither a docstring in the schema nor a line in FAMILIAR"
    return "As in `TrainingArguments`."


@pytest.mark.parametrize("page", TABLES)
def test_every_key_stands_on_its_page_with_its_default(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    shown = text.partition(FIELDS_BEGIN)[2].partition(FIELDS_END)[0].strip()
    assert shown == render_fields(TABLES[page]), f"docs/{page} is behind the schema: run `python tests/test_docs.py`"
    assert not FAMILIAR.keys() - set().union(*map(fields, TABLES.values()))


def write_fields(page: str) -> None:
    path = DOCS / page
    before, begin, rest = path.read_text(encoding="utf-8").partition(FIELDS_BEGIN)
    after = rest.partition(FIELDS_END)[2]
    path.write_text(f"{before}{begin}\n\n{render_fields(TABLES[page])}\n\n{FIELDS_END}{after}", encoding="utf-8")


if __name__ == "__main__":
    for name in TABLES:
        write_fields(name)
