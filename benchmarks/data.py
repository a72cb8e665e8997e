"""From a file of tool calls to packs: `harness convert`, `validate` and `prepare` beside `datasets.map` and TRL's own preparation.

    python benchmarks/data.py                           writes benchmarks/results/data-cpu.{json,md}

Side by side   the same rows, tokenizer, masks and packed length on both sides, which take turns, each in a process of its own and with
               empty caches; TRL with `dataset_num_proc` 1 and as many as there are cores. Rows, tokens and trained tokens must agree, or
               there is no result.
Growth         10^3 to 10^6 rows of one tool each, every size in a process of its own, whose memory, children included, is looked at five
               times a second.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from sft import describe_machine, met, save_result, say, spread  # noqa: E402

from harness.run import git_commit, library_versions  # noqa: E402

SEED = 7
VOCABULARY = 8192
TOOLS = 2000
AIM = 2.0
OURS = ("convert", "validate", "read", "tokenise", "pack")
THEIRS = ("map", "tokenise", "pack")
COMPARED = {
    "tokenise_pack": ("tokenise and pack", OURS[3:], THEIRS[1:]),
    "read_tokenise_pack": ("read, tokenise and pack, beside rows that are in Arrow", OURS[2:], THEIRS[1:]),
    "unvalidated": ("from the file to packs, no validate", ("convert", *OURS[2:]), THEIRS),
    "everything": ("from the file to packs, all checks", OURS, THEIRS),
}
"""What is compared -> in words, our stages, theirs."""


@dataclass(frozen=True)
class Plan:
    rows: int
    """Of the comparison."""
    turns: int
    growth: tuple[int, ...]


PLAN = Plan(20_000, 3, (1_000, 10_000, 100_000, 1_000_000))
TRIAL = Plan(300, 1, (100, 300))


# ---- what all sides are given


def words_of_the_docs() -> list[str]:
    """English as people write it, which a tokenizer cuts as it cuts theirs."""
    pages = [HERE.parent / "README.md", *sorted((HERE.parent / "docs").glob("*.md"))]
    words = [word for page in pages for word in re.findall(r"\b[a-z]{2,12}\b", page.read_text(encoding="utf-8"))]
    return list(dict.fromkeys(words))


def make_rows(path: Path, rows: int, words: list[str], most_tools: int = 4) -> None:
    """xLAM's layout: a question, some of 2,000 tools (xLAM has 3,673) with their JSON Schemas, and one or two calls that fit them."""
    rng = random.Random(SEED)

    def say_words(least: int, most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(least, most)))

    values = {
        "string": lambda: say_words(1, 3),
        "integer": lambda: rng.randrange(1000),
        "number": lambda: rng.randrange(4000) / 4,  # quarters: of 1.89 the Json of `datasets` makes 1.8900000000000001, in other tokens
        "boolean": lambda: rng.random() < 0.5,
    }
    tools = []
    for number in range(TOOLS):
        names = rng.sample(words, rng.randint(1, 4))
        properties = {name: {"type": rng.choice(list(values)), "description": say_words(4, 12)} for name in names}
        parameters = {"type": "object", "properties": properties, "required": names[: rng.randint(1, len(names))]}
        name = f"{rng.choice(words)}_{rng.choice(words)}_{number}"
        tools.append({"name": name, "description": say_words(8, 20), "parameters": parameters})
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(rows):
            offered = rng.sample(tools, rng.randint(1, most_tools))
            calls = []
            for tool in rng.sample(offered, min(len(offered), rng.randint(1, 2))):
                parameters = tool["parameters"]
                given = [name for name in parameters["properties"] if name in parameters["required"] or rng.random() < 0.5]
                arguments = {name: values[parameters["properties"][name]["type"]]() for name in given}
                calls.append({"name": tool["name"], "arguments": arguments})
            file.write(json.dumps({"query": say_words(8, 30), "tools": json.dumps(offered), "answers": json.dumps(calls)}) + "\n")


def save_tokenizer(folder: Path, rows: Path) -> None:
    """Byte-level BPE, as Llama's and Qwen's are, with the template that ships with harness; trained on some of the rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    from tokenizers import Regex

    pieces = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=["<|end|>", "<|pad|>"], show_progress=False
    )
    with open(rows, encoding="utf-8") as file:
        tokenizer.train_from_iterator((line for _, line in zip(range(5000), file, strict=False)), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", model_max_length=10**6)
    fast.chat_template = (HERE.parent / "configs" / "templates" / "plain-tools.jinja").read_text(encoding="utf-8")
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))


# ---- a side in a process of its own


def run_side(name: str, folder: Path, num_proc: int | None, peaks: dict | None = None) -> dict:
    """peaks: filled with the most memory that the process and its children held, by stage."""
    for left in ("cache", "messages.jsonl", "run"):
        shutil.rmtree(folder / left, ignore_errors=True)
    (folder / "messages.jsonl").unlink(missing_ok=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    command = [sys.executable, str(HERE / "data_sides.py"), name, str(folder), *([str(num_proc)] if num_proc else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.extend(process.stderr))
        reader.start()
        watch = Watch(process.pid, peaks) if peaks is not None else None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if watch and line.startswith("# "):
                watch.stage = line[2:].strip()
        reader.join()
    if watch:
        watch.stop()
    if process.returncode:
        raise SystemExit(f"{name} ended with {process.returncode}:\n{''.join(errors)[-3000:]}")
    return json.loads(lines[-1])


class Watch(threading.Thread):
    """The most memory of a process and its children together (PSS: what several share counts once): `resident`, and of that `anonymous`,
    which the kernel cannot take back as it can the pages of mapped files."""

    def __init__(self, pid: int, peaks: dict, every_s: float = 0.2):
        super().__init__(daemon=True)
        self._pid, self._peaks, self._every_s, self._ended = pid, peaks, every_s, threading.Event()
        self.stage = "starting"
        self.start()

    def run(self) -> None:
        import psutil

        while not self._ended.wait(self._every_s):
            try:
                pids = [self._pid, *(child.pid for child in psutil.Process(self._pid).children(recursive=True))]
            except psutil.NoSuchProcess:
                return
            held = [memory_of(pid) for pid in pids]
            for kind in ("resident", "anonymous"):
                of_stage = self._peaks.setdefault(kind, {})
                of_stage[self.stage] = max(of_stage.get(self.stage, 0), sum(one[kind] for one in held))

    def stop(self) -> None:
        self._ended.set()
        self.join()


def memory_of(pid: int) -> dict[str, int]:
    """Bytes; none of a process that has ended."""
    try:
        told = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        told = ""
    found = dict(re.findall(r"^(Pss|Pss_Anon):\s+(\d+) kB$", told, re.MULTILINE))
    return {"resident": int(found.get("Pss", 0)) * 1024, "anonymous": int(found.get("Pss_Anon", 0)) * 1024}


# ---- measured


def compare(folder: Path, plan: Plan, cores: int) -> dict:
    sides = {"harness": ("harness", None), "TRL, 1 process": ("trl", 1), f"TRL, {cores} processes": ("trl", cores)}
    found = {name: [] for name in sides}
    for turn in range(plan.turns):
        for name in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
            found[name].append(run_side(sides[name][0], folder, sides[name][1]))
            say(f"turn {turn + 1} of {plan.turns}: {name}: {sum(found[name][-1]['seconds'].values()):.1f} s")
    check_same(found)
    return {
        "sides": {name: [run["seconds"] for run in runs] for name, runs in found.items()},
        "cpu_s": {name: [run["cpu_s"] for run in runs] for name, runs in found.items()},
        "ratios": ratios(found),
        "counts": {name: runs[0]["counts"] for name, runs in found.items()},
    }


def check_same(found: dict[str, list[dict]]) -> None:
    """Raises SystemExit unless all sides made the same of the rows; how many packs they fill is their own affair."""
    counts = {name: [{k: v for k, v in run["counts"].items() if k != "packs"} for run in runs] for name, runs in found.items()}
    wanted = counts["harness"][0]
    if any(count != wanted for runs in counts.values() for count in runs):
        raise SystemExit(f"the sides did not make the same of the rows:\n{json.dumps(counts, indent=1)}")


def ratios(found: dict[str, list[dict]]) -> list[dict]:
    """Theirs over ours, turn by turn, so that noise hits both."""
    ours = [run["seconds"] for run in found["harness"]]
    return [
        {"side": name}
        | {
            what: spread([sum(run["seconds"][s] for s in theirs) / sum(own[s] for s in mine) for run, own in zip(runs, ours, strict=True)])
            for what, (_, mine, theirs) in COMPARED.items()
        }
        for name, runs in found.items()
        if name != "harness"
    ]


def grow(folder: Path, plan: Plan, words: list[str]) -> list[dict]:
    measured = []
    for rows in plan.growth:
        make_rows(folder / "raw.jsonl", rows, words, most_tools=1)
        peaks: dict = {}
        run = run_side("harness", folder, None, peaks)
        seconds = run["seconds"]
        measured.append(
            {
                "rows": rows,
                "raw_bytes": (folder / "raw.jsonl").stat().st_size,
                "seconds": seconds,
                "rows_per_s": rows / sum(seconds.values()),
                "tokens": run["counts"]["tokens"],
                "peaks": peaks,
            }
        )
        most = {kind: max(stages.values()) / 2**20 for kind, stages in peaks.items()}
        say(f"{rows:,} rows: {sum(seconds.values()):.1f} s, {measured[-1]['rows_per_s']:,.0f} rows/s, peak {most} MiB")
    return measured


def run(plan: Plan, work: Path) -> dict:
    began, machine, cores = time.perf_counter(), describe_machine("cpu"), len(os.sched_getaffinity(0))
    words = words_of_the_docs()
    make_rows(work / "raw.jsonl", plan.rows, words)
    save_tokenizer(work / "tokenizer", work / "raw.jsonl")
    compared = compare(work, plan, cores)
    return {
        "kind": "cpu",
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "git_commit": git_commit(),
        "plan": asdict(plan),
        "comparison": compared,
        "growth": grow(work, plan, words),
        "machine": machine | {"load_after": os.getloadavg()[0]},
        "versions": library_versions(),
        "seconds": time.perf_counter() - began,
    }


# ---- told


def render(result: dict) -> str:
    machine, plan, compared, growth = result["machine"], result["plan"], result["comparison"], result["growth"]
    counts = compared["counts"]["harness"]
    lines = [
        "# Data: from a file of tool calls to packs, beside `datasets.map` and TRL's own preparation",
        "",
        f"{machine['device']}, {machine['cpus']} cores, load {machine['load_before']:.1f} before and {machine['load_after']:.1f} after; "
        f"{result['date']}, commit {result['git_commit'][:12]}; " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".",
        "",
        f"{plan['rows']:,} rows of xLAM's layout, {counts['tokens'] / counts['rows']:.0f} tokens each, of which "
        f"{counts['trained_tokens'] / counts['tokens']:.0%} are trained; {plan['turns']} turns. Rows, tokens and trained tokens of all "
        "sides are the same. Seconds are medians; imports are in none.",
        "",
        "| side | convert, or `map` | validate | read | tokenise | pack | together, s | CPU seconds | rows/s | packs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in compared["sides"].items():
        stages = {stage: spread([run[stage] for run in runs])["median"] for stage in runs[0]}
        whole = spread([sum(run.values()) for run in runs])["median"]
        shown = [stages.get("convert", stages.get("map")), *(stages.get(stage) for stage in OURS[1:])]
        cells = [f"{value:.1f}" if value is not None else "–" for value in shown]
        cells += [f"{whole:.1f}", f"{spread(compared['cpu_s'][name])['median']:.1f}", f"{plan['rows'] / whole:,.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {compared['counts'][name]['packs']:,} |")
    lines += [
        "",
        "`validate` has no other side: TRL checks no row, no schema, no call, and looks for no repeats. `read` is `harness prepare`'s own "
        "reading of the messages, which checks each row again; TRL's rows are in Arrow by then, which is part of `map`.",
        "",
        "| TRL's seconds ÷ ours: median (range) | " + " | ".join(of["side"] for of in compared["ratios"]) + " |",
        "|---" * (1 + len(compared["ratios"])) + "|",
    ]
    for what, (shown, *_) in COMPARED.items():
        cells = [f"{of[what]['median']:.2f} ({of[what]['min']:.2f} to {of[what]['max']:.2f})" for of in compared["ratios"]]
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    best = min(of["everything"]["median"] for of in compared["ratios"])
    lines += ["", f"Aim, at least {AIM:.0f} times as fast from the file to packs as TRL at its best: {best:.2f}. {met(best >= AIM)}", ""]
    return "\n".join(lines + render_growth(growth)) + "\n"


def render_growth(growth: list[dict]) -> list[str]:
    least, most = growth[0], growth[-1]
    row_bytes = most["raw_bytes"] / most["rows"]
    held = {kind: {run["rows"]: max(run["peaks"][kind].values()) for run in growth} for kind in ("resident", "anonymous")}
    added = (held["anonymous"][most["rows"]] - held["anonymous"][least["rows"]]) / (most["rows"] - least["rows"])
    lines = [
        f"Growth, {row_bytes:,.0f} bytes and {most['tokens'] / most['rows']:,.0f} tokens a row, all stages of `harness`:",
        "",
        "| rows | file, MiB | convert, s | validate, s | read, s | tokenise, s | pack, s | rows/s | peak, MiB | of that anonymous, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in growth:
        seconds = " | ".join(f"{run['seconds'][stage]:.1f}" for stage in OURS)
        peaks = " | ".join(f"{held[kind][run['rows']] / 2**20:,.0f}" for kind in ("resident", "anonymous"))
        lines.append(f"| {run['rows']:,} | {run['raw_bytes'] / 2**20:,.0f} | {seconds} | {run['rows_per_s']:,.0f} | {peaks} |")
    lines += [
        "",
        f"From {least['rows']:,} to {most['rows']:,} rows anonymous memory grows by {added:,.0f} bytes a row; the rest of the peak is "
        "pages of mapped files, which the kernel takes back when it needs them.",
    ]
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/data.py", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, help="folder for data-cpu.{json,md}; left out: benchmarks/results")
    parser.add_argument("--trial", action="store_true", help="few rows, no measurement; with --results")
    options = parser.parse_args(argv)
    if options.trial and options.results is None:
        parser.error("--trial measures nothing: give --results FOLDER, so that it replaces no measurement")
    with tempfile.TemporaryDirectory(prefix="bench-data-") as work:
        result = run(TRIAL if options.trial else PLAN, Path(work))
    target = (options.results or HERE / "results") / "data-cpu"
    save_result(result, render(result), target)


if __name__ == "__main__":
    main()
