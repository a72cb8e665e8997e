"""`harness run` beside TRL's own script, `python -m trl.scripts.sft`: same weights, rows and batch, on one machine, in one run.

    python benchmarks/sft.py [--device cpu|cuda]        writes benchmarks/results/sft-<cpu|gpu>.{json,md}

Equal settings   what our code costs on top of TRL: both sides get the same batches in the same order, and the same optimiser, precision and
                 attention. Their losses must agree at every step, or there is no result. Seconds per step are compared pair by pair.
Defaults         what a user gets who writes only model, data, max_length and batch size: one pass over the same rows of mixed length, in
                 tokens per second, padding not counted. Variants of TRL's command say where the difference comes from.

All sides of a comparison are started as users start them, one after another, and stop after their first step (which gives the time to the
first step). Then they take turns, one optimiser step each, A B B A, so that noise on the machine hits all of them alike.
benchmarks/probe/sitecustomize.py holds the stopwatch, the same for every side. W&B is off, and no checkpoints are written, on both.
"""

import argparse
import json
import os
import platform
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from harness.run import git_commit, library_versions  # noqa: E402

SEED = 7
EQUAL_SKIP = 3
"""Steps at the start that count only in the time to the first step: allocators and caches fill."""
DEFAULTS_SKIP = 1
"""Only one here: batches grouped by length begin with the longest ones, which must not be left out."""
LOSS_TOLERANCE = {"cpu": 1e-5, "gpu": 1e-3}
"""Relative; bf16 kernels on a GPU do not add in a fixed order."""
STEP_TIMEOUT_S = 600


@dataclass(frozen=True)
class Size:
    """How large the model and the data are on a kind of machine."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    rows: int
    batch: int
    equal_steps: int
    repeats: int = 3
    max_length: int = 2048


SIZES = {
    "cpu": Size(vocabulary=2048, hidden=128, layers=4, heads=4, rows=320, batch=8, equal_steps=18),
    "gpu": Size(vocabulary=32000, hidden=1536, layers=16, heads=12, rows=1280, batch=4, equal_steps=60),
}


# ---- what both sides are given -----------------------------------------------------------------------------------------------------------


def row_lengths(rows: int, seed: int = SEED) -> list[int]:
    """Tokens per row: log-normal about a median of 180, from 30 to 2000; most rows are short and a few are long, as in chat data."""
    rng = random.Random(seed)
    return [min(2000, max(30, round(rng.lognormvariate(5.2, 0.9)))) for _ in range(rows)]


def make_rows(size: Size, seed: int = SEED) -> list[dict]:
    """Conversations of two turns, of exactly `row_lengths` tokens with `save_tokenizer`'s template (a mark per turn, an end per turn)."""
    rng = random.Random(seed)

    def words(count: int) -> str:
        return " ".join(f"w{rng.randrange(size.vocabulary - 8)}" for _ in range(count))

    rows = []
    for length in row_lengths(size.rows, seed):
        asked = (length - 4) * 3 // 5
        turns = [{"role": "user", "content": words(asked)}, {"role": "assistant", "content": words(length - 4 - asked)}]
        rows.append({"messages": turns})
    return rows


TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' ~ message.role ~ '|> ' -}}
{%- if message.role == 'assistant' -%}{%- generation -%}{{- message.content ~ ' <|end|> ' -}}{%- endgeneration -%}
{%- else -%}{{- message.content ~ ' <|end|> ' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|> ' -}}{%- endif -%}"""


def save_tokenizer(size: Size, folder: Path) -> None:
    """One word, one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|unknown|>", "<|spare|>"]
    tokens = [*marks, *(f"w{n}" for n in range(size.vocabulary - len(marks)))]
    tokenizer = Tokenizer(models.WordLevel({token: n for n, token in enumerate(tokens)}, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", unk_token="<|unknown|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def save_model(size: Size, folder: Path) -> int:
    """A Llama with random weights; returns its number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.max_length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model.num_parameters()


# ---- the sides ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class Step:
    seconds: float
    cpu_seconds: float
    """Of all threads of the process; on a CPU the figure that other load does not change."""
    tokens: int
    loss: float | None


@dataclass
class Side:
    name: str
    argv: list[str]
    first_step_s: float = 0.0
    peak_bytes: int = 0
    threads: int = 0
    steps: list[Step] = field(default_factory=list)
    finished: bool = False


def harness_side(name: str, folder: Path, size: Size, *, model: dict, data: dict, train: dict) -> Side:
    """A recipe as a user writes it: model, data, max_length, batch; the sections are what a comparison adds."""
    data = {"cache_dir": str(folder / "cache")} | data
    recipe = {
        "model": {"name_or_path": str(folder.parent / "base")} | model,
        "data": {"train": str(folder.parent / "rows" / "train.jsonl"), "max_length": size.max_length} | data,
        "train": {"per_device_train_batch_size": size.batch} | train,
        "tracking": {"mode": "disabled"},
        "output_dir": str(folder / "run"),
    }
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(json.dumps(recipe, indent=2))  # JSON is YAML
    return Side(name, [sys.executable, "-m", "harness", "run", str(folder / "recipe.yaml")])


def trl_side(name: str, folder: Path, size: Size, kind: str, options: dict) -> Side:
    """TRL's script with the same four settings; and `assistant_only_loss`, so that both sides train the same tokens.

    On a CPU `use_cpu` as well: its default, bf16, is refused there without it.
    """
    folder.mkdir(parents=True)
    given = {
        "model_name_or_path": folder.parent / "base",
        "dataset_name": folder.parent / "rows",
        "max_length": size.max_length,
        "per_device_train_batch_size": size.batch,
        "num_train_epochs": 1,
        "assistant_only_loss": True,
        "report_to": "none",
        "save_strategy": "no",
        "output_dir": folder / "run",
    }
    given |= ({"use_cpu": True} if kind == "cpu" else {}) | options
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return Side(name, [sys.executable, "-m", "trl.scripts.sft", *words])


def equal_sides(folder: Path, size: Size, kind: str) -> list[Side]:
    """Everything that costs time said on both sides, a log line at every step included."""
    same = {"max_steps": size.equal_steps, "learning_rate": 1e-4, "lr_scheduler_type": "constant", "logging_steps": 1, "seed": SEED}
    same |= {"optim": "adamw_torch_fused", "max_grad_norm": 1.0, "gradient_checkpointing": False}
    same |= {"bf16": True, "tf32": True} if kind == "gpu" else {"bf16": False}
    attention = {"attn_implementation": "sdpa"}
    return [
        harness_side("harness", folder / "harness", size, model=attention, data={"packing": False}, train=same),
        trl_side("TRL", folder / "trl", size, kind, same | attention),
    ]


def default_sides(folder: Path, size: Size, kind: str) -> list[Side]:
    without = {"gradient_checkpointing": False}
    sides = [
        harness_side("harness", folder / "harness", size, model={}, data={}, train={}),
        trl_side("TRL", folder / "trl", size, kind, {}),
        trl_side("TRL, no gradient checkpointing", folder / "trl-gc", size, kind, without),
    ]
    if kind == "cpu":
        # TRL computes in bf16 by default, on a CPU too, where we compute in float32.
        sides.append(trl_side("TRL, no gradient checkpointing, float32", folder / "trl-gc-fp32", size, kind, without | {"bf16": False}))
    return sides


# ---- the race ----------------------------------------------------------------------------------------------------------------------------


def race(sides: Sequence[Side], folder: Path, order: str) -> None:
    """Start the sides in their order and let them take turns to their ends; fills in what they report.

    order: `file` gives every side the rows as they stand in the file, `own` leaves them their own order. Raises SystemExit when one fails.
    """
    # A path for a socket may have 107 bytes, and the work folder may be deep.
    with tempfile.TemporaryDirectory(prefix="bench-") as short, socket.socket(socket.AF_UNIX) as listener:
        address = str(Path(short) / "turns")
        listener.bind(address)
        listener.listen()
        running = []
        try:
            for side in sides:
                running.append(start(side, folder, listener, side_environment(address, order, Path(short) / side.name)))
            take_turns(running)
            for runner in running:
                runner.finish()
        finally:
            for runner in running:
                runner.stop()


def side_environment(address: str, order: str, cache: Path) -> dict[str, str]:
    paths = [str(HERE / "probe"), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "BENCH_SOCKET": address,
        "BENCH_ORDER": order,
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        # `harness run` sets it on a CPU. Without it TRL's threads spin at every barrier, and a small load beside them makes its steps many
        # times as long; with it the result is about the code and not about the neighbours.
        "OMP_WAIT_POLICY": "PASSIVE",
        # Empty, so that each of TRL's starts prepares its data, as each of ours does.
        "HF_DATASETS_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


class Runner:
    """A side that runs: its process, and the connection over which it reports a step and waits for its turn."""

    def __init__(self, side: Side, process: subprocess.Popen, log: Path):
        self.side, self.process, self.log = side, process, log
        self.reports = None
        self.connection: socket.socket | None = None

    def take_report(self) -> None:
        try:
            line = self.reports.readline()
        except TimeoutError:
            line = ""
        if not line:
            self.fail("stopped reporting steps")
        report = json.loads(line)
        side = self.side
        before = sum(step.tokens for step in side.steps)
        side.steps.append(Step(report["seconds"], report["cpu_seconds"], report["tokens"] - before, report["loss"]))
        side.peak_bytes, side.threads, side.finished = report["peak_bytes"], report["threads"], report["last"]

    def step(self) -> None:
        self.connection.sendall(b".")
        self.take_report()

    def finish(self) -> None:
        self.connection.sendall(b".")
        if self.process.wait(STEP_TIMEOUT_S):
            self.fail(f"exit code {self.process.returncode}")

    def fail(self, what: str) -> None:
        raise SystemExit(f"{self.side.name}: {what}\n$ {' '.join(self.side.argv)}\n{self.log.read_text(errors='replace')[-4000:]}")

    def stop(self) -> None:
        if self.connection is not None:
            self.connection.close()
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)


def start(side: Side, folder: Path, listener: socket.socket, environment: dict[str, str]) -> Runner:
    """Start a side and wait until its first step has ended."""
    log = folder / f"{side.name.replace(' ', '-').replace(',', '')}.log"
    with log.open("w") as stream:
        started = time.perf_counter()
        runner = Runner(side, subprocess.Popen(side.argv, env=environment, stdout=stream, stderr=subprocess.STDOUT), log)
    listener.settimeout(1.0)
    try:
        while runner.connection is None:
            try:
                runner.connection, _ = listener.accept()
            except TimeoutError:
                if runner.process.poll() is not None:
                    runner.fail(f"ended with exit code {runner.process.returncode} before training began")
        runner.connection.settimeout(STEP_TIMEOUT_S)
        runner.reports = runner.connection.makefile("r")
        runner.take_report()
    except BaseException:
        runner.stop()
        raise
    side.first_step_s = time.perf_counter() - started
    return runner


def take_turns(running: list[Runner]) -> None:
    """One step each until all have had their last, every second round in reverse. Who is done waits: no export runs beside a step."""
    forward = True
    while any(not runner.side.finished for runner in running):
        for runner in running if forward else reversed(running):
            if not runner.side.finished:
                runner.step()
        forward = not forward


# ---- numbers -----------------------------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def compare_pairs(ours: Sequence[Step], theirs: Sequence[Step], skip: int = EQUAL_SKIP) -> dict:
    """Seconds per step of both, and ours / theirs at the same step of the same race, without the first `skip` steps."""
    pairs = list(zip(ours, theirs, strict=True))[skip:]
    return {
        "steps": len(pairs),
        "harness_step_s": spread([a.seconds for a, _ in pairs]),
        "trl_step_s": spread([b.seconds for _, b in pairs]),
        "ratio": spread([a.seconds / b.seconds for a, b in pairs]),
        "ratio_of_sums": sum(a.seconds for a, _ in pairs) / sum(b.seconds for _, b in pairs),
        "harness_cpu_s": spread([a.cpu_seconds for a, _ in pairs]),
        "trl_cpu_s": spread([b.cpu_seconds for _, b in pairs]),
        "cpu_ratio": spread([a.cpu_seconds / b.cpu_seconds for a, b in pairs]),
    }


def loss_gap(ours: Sequence[Step], theirs: Sequence[Step]) -> float:
    """The largest relative difference between the losses of the same step. Raises SystemExit when the batches were not the same."""
    differing = [n for n, (a, b) in enumerate(zip(ours, theirs, strict=True), start=1) if a.tokens != b.tokens]
    if differing:
        raise SystemExit(f"equal settings: the sides had batches of different sizes at steps {differing}")
    gaps = [abs(a.loss - b.loss) / abs(b.loss) for a, b in zip(ours, theirs, strict=True) if a.loss is not None and b.loss is not None]
    if not gaps:
        raise SystemExit("equal settings: no losses were logged, so nothing shows that both sides trained the same")
    return max(gaps)


def tokens_per_s(steps: Sequence[Step], skip: int = DEFAULTS_SKIP) -> float:
    counted = steps[skip:]
    return sum(step.tokens for step in counted) / sum(step.seconds for step in counted)


def tokens_per_cpu_s(steps: Sequence[Step], skip: int = DEFAULTS_SKIP) -> float:
    counted = steps[skip:]
    return sum(step.tokens for step in counted) / sum(step.cpu_seconds for step in counted)


def measure_equal(folder: Path, size: Size, kind: str) -> tuple[dict, list[Side]]:
    ours, theirs, raced = [], [], []
    pairs, gap = [], 0.0
    for repeat in range(size.repeats):
        sides = equal_sides(folder / f"equal-{repeat}", size, kind)
        link_inputs(folder, folder / f"equal-{repeat}")
        # Who starts first changes, and with it who takes the first turn.
        race(sides if repeat % 2 == 0 else sides[::-1], folder / f"equal-{repeat}", "file")
        gap = max(gap, loss_gap(sides[0].steps, sides[1].steps))
        pairs.append(compare_pairs(sides[0].steps, sides[1].steps))
        ours += sides[0].steps[EQUAL_SKIP:]
        theirs += sides[1].steps[EQUAL_SKIP:]
        raced += sides
        say(f"equal settings, race {repeat + 1}: {describe(pairs[-1]['ratio'])} of TRL's seconds per step; losses differ by {gap:.1e}")
    if gap > LOSS_TOLERANCE[kind]:
        raise SystemExit(f"equal settings: losses differ by {gap:.1e}, over {LOSS_TOLERANCE[kind]:.0e}: the sides did not train the same")
    medians = [pair["ratio"]["median"] for pair in pairs]
    return compare_pairs(ours, theirs, skip=0) | {"races": size.repeats, "race_medians": medians, "loss_gap": gap}, raced


def measure_defaults(folder: Path, size: Size, kind: str) -> tuple[dict, list[Side]]:
    sides = default_sides(folder / "defaults", size, kind)
    link_inputs(folder, folder / "defaults")
    race(sides, folder / "defaults", "own")
    ours, ours_cpu = tokens_per_s(sides[0].steps), tokens_per_cpu_s(sides[0].steps)
    table = [
        {
            "side": side.name,
            "tokens_per_s": tokens_per_s(side.steps),
            "harness_over_this": ours / tokens_per_s(side.steps),
            "harness_over_this_in_cpu_s": ours_cpu / tokens_per_cpu_s(side.steps),
            "steps": len(side.steps),
            "tokens": sum(step.tokens for step in side.steps),
            "step_s": spread([step.seconds for step in side.steps[DEFAULTS_SKIP:]]),
            "peak_bytes": side.peak_bytes,
        }
        for side in sides
    ]
    for line in table:
        times, cpu_times = line["harness_over_this"], line["harness_over_this_in_cpu_s"]
        say(f"defaults: {line['side']}: {line['tokens_per_s']:,.0f} tokens/s; harness / this {times:.2f}, by CPU seconds {cpu_times:.2f}")
    return {"sides": table}, sides


def link_inputs(folder: Path, race_folder: Path) -> None:
    for name in ("base", "rows"):
        (race_folder / name).symlink_to(folder / name)


# ---- the report --------------------------------------------------------------------------------------------------------------------------


def describe(values: dict[str, float], digits: int = 3) -> str:
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f} to {values['max']:.{digits}f})"


def gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def met(holds: bool) -> str:
    return "Met." if holds else "Not met."


def render(result: dict) -> str:
    """The result as markdown; its first letters say when and where it was measured, its values are median (min to max)."""
    return "\n".join([*render_setting(result), *render_equal(result), *render_defaults(result), *render_first_step(result)]) + "\n"


def render_setting(result: dict) -> list[str]:
    machine, size, tokens = result["machine"], result["size"], result["row_tokens"]
    where = "a GPU" if result["kind"] == "gpu" else "a CPU"
    return [
        f"# `harness run` beside `python -m trl.scripts.sft` on {where}",
        "",
        f"{result['date']}, commit {result['git_commit'] or 'unknown'}.",
        f"{machine['device']}, {machine['cpus']} cores, {gib(machine['memory_bytes'])} GiB; "
        f"load {machine['load_before']:.1f} at the start, {machine['load_after']:.1f} at the end.",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + f"; Python {machine['python']}.",
        "",
        f"A Llama of {result['parameters'] / 1e6:.1f} M parameters with random weights; {size['rows']} conversations of {min(tokens)} to "
        f"{max(tokens)} tokens (median {statistics.median(tokens):.0f}); batch {size['batch']}, max_length {size['max_length']}. "
        "Values are median (min to max).",
        "",
    ]


def memory_name(kind: str) -> str:
    return "peak CUDA memory in tensors, GiB" if kind == "gpu" else "peak resident memory of the training process, GiB"


def render_equal(result: dict) -> list[str]:
    equal = result["equal"]
    seconds = f"{describe(equal['harness_step_s'])} | {describe(equal['trl_step_s'])} | **{describe(equal['ratio'])}**"
    cpu = f"{describe(equal['harness_cpu_s'])} | {describe(equal['trl_cpu_s'])} | **{describe(equal['cpu_ratio'])}**"
    ours, theirs = equal["harness_peak_bytes"], equal["trl_peak_bytes"]
    return [
        "## Equal settings",
        "",
        "| | harness | TRL | harness / TRL |",
        "|---|---|---|---|",
        f"| seconds per step, {equal['steps']} pairs of steps | {seconds} |",
        f"| CPU seconds per step, all threads | {cpu} |",
        f"| seconds of all these steps together | | | {equal['ratio_of_sums']:.3f} |",
        f"| median of each race | | | {', '.join(f'{value:.3f}' for value in equal['race_medians'])} |",
        f"| {memory_name(result['kind'])} | {gib(ours)} | {gib(theirs)} | {ours / theirs:.3f} |",
        f"| largest relative difference of a step's loss | | | {equal['loss_gap']:.1e} |",
        "",
        f"Aim: seconds per step within 2 % of TRL's. {met(equal['ratio']['median'] <= 1.02)}",
        "",
    ]


def render_defaults(result: dict) -> list[str]:
    sides = result["defaults"]["sides"]
    rows = [
        f"| {side['side']} | {side['tokens_per_s']:,.0f} | {side['harness_over_this']:.2f} | {side['harness_over_this_in_cpu_s']:.2f} | "
        f"{side['steps']} | {gib(side['peak_bytes'])} |"
        for side in sides
    ]
    return [
        "## Defaults",
        "",
        "| | tokens/s, padding not counted | harness / this | harness / this, by CPU seconds | steps for the same rows | "
        f"{memory_name(result['kind'])} |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"Aim: 1.5 times the tokens per second of TRL's defaults. {met(sides[1]['harness_over_this'] >= 1.5)}",
        "",
    ]


def render_first_step(result: dict) -> list[str]:
    first = result["first_step"]
    return [
        "## From the command to the end of the first step",
        "",
        "| | harness | TRL | harness / TRL |",
        "|---|---|---|---|",
        f"| seconds, {first['starts']} starts each | {describe(first['harness_s'], 1)} | {describe(first['trl_s'], 1)} | "
        f"{first['harness_s']['median'] / first['trl_s']['median']:.2f} |",
    ]


def describe_machine(kind: str) -> dict:
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    device = names[0] if names else platform.machine()
    if kind == "gpu":
        import torch

        device = f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "device": device,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def run(kind: str, size: Size, work: Path) -> dict:
    """Both comparisons; returns what is written to the results."""
    began = time.perf_counter()
    machine = describe_machine(kind)
    (work / "rows").mkdir(parents=True)
    rows = make_rows(size)
    (work / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tokenizer(size, work / "base")
    parameters = save_model(size, work / "base")
    # Reads the libraries from the disk once, so that whoever starts first does not do it for the others.
    subprocess.run([sys.executable, "-c", "import trl.trainer.sft_trainer, deepspeed, peft, wandb"], check=True, capture_output=True)
    equal, raced = measure_equal(work, size, kind)
    defaults, default_raced = measure_defaults(work, size, kind)
    # Not those of the other comparison: there the first batches differ, and ours is the longest.
    ours = [side.first_step_s for side in raced if side.name == "harness"]
    theirs = [side.first_step_s for side in raced if side.name == "TRL"]
    equal["harness_peak_bytes"] = max(side.peak_bytes for side in raced if side.name == "harness")
    equal["trl_peak_bytes"] = max(side.peak_bytes for side in raced if side.name == "TRL")
    return {
        "kind": kind,
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "git_commit": git_commit(),
        "machine": machine | {"load_after": os.getloadavg()[0]},
        "versions": library_versions(),
        "size": vars(size),
        "parameters": parameters,
        "row_tokens": row_lengths(size.rows),
        "equal": equal,
        "defaults": defaults,
        "first_step": {"harness_s": spread(ours), "trl_s": spread(theirs), "starts": len(ours)},
        "threads": sorted({side.threads for side in (*raced, *default_raced)}),
        "seconds": time.perf_counter() - began,
        "raw": [raw_numbers(side) for side in (*raced, *default_raced)],
    }


def raw_numbers(side: Side) -> dict:
    steps = [[round(step.seconds, 4), round(step.cpu_seconds, 4), step.tokens] for step in side.steps]
    return {"side": side.name, "argv": side.argv[1:], "first_step_s": round(side.first_step_s, 2), "seconds_cpu_seconds_tokens": steps}


def say(text: str) -> None:
    print(text, flush=True)


def save_result(result: dict, text: str, target: Path) -> None:
    """As TARGET.json for programs and TARGET.md for people, and on the screen."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    target.with_suffix(".md").write_text(text)
    after = f" after {result['seconds']:.0f} s" if "seconds" in result else ""
    say(f"\n{text}\nwritten to {target}.json and .md{after}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/sft.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="left out: cuda where there is a GPU")
    parser.add_argument("--results", type=Path, help="folder for sft-<cpu|gpu>.{json,md}; left out: benchmarks/results")
    parser.add_argument("--work", type=Path, help="keep models, runs and logs here; left out: a temporary folder")
    parser.add_argument("--steps", type=int, help="a short trial, no measurement: so many steps per race; with --results")
    options = parser.parse_args(argv)
    if options.steps is not None and (options.steps <= EQUAL_SKIP or options.results is None):
        parser.error(f"--steps is a trial: at least {EQUAL_SKIP + 1}, and --results FOLDER, so that it replaces no measurement")
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this machine has no GPU that torch can use; leave it out to measure on the CPU")
    kind = "gpu" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    # One at most: with several in sight and no launcher TRL's script refuses to start.
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if kind == "cpu" else os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    size = SIZES[kind]
    if options.steps:
        size = Size(**vars(size) | {"rows": options.steps * size.batch, "equal_steps": options.steps, "repeats": 1})
    work = options.work.resolve() if options.work else Path(tempfile.mkdtemp(prefix="bench-sft-"))
    try:
        result = run(kind, size, work)
    finally:
        if not options.work:
            shutil.rmtree(work, ignore_errors=True)
    results = options.results or HERE / "results"
    target = results / f"sft-{kind}"
    save_result(result, render(result), target)


if __name__ == "__main__":
    main()
