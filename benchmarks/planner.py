"""`harness plan` beside what training really takes: the peak of tensors of the fullest rank, over a grid of recipes with random weights.

    python benchmarks/planner.py [--device cpu|cuda]       writes benchmarks/results/planner-<cpu|gpu>.{json,md}

Each row is a recipe that a rank trains as `harness run --smoke` does, two steps on rows of exactly max_length tokens, and a plan of the
same recipe. On a GPU the peak is torch.cuda.max_memory_allocated during the training. On a CPU it is counted: a dispatch mode sees every
tensor that an operation makes, and when its storage goes; there DeepSpeed and DDP have real ranks (gloo). What neither counter sees, the
CUDA context and what the allocator cannot use, is left out of the plan too.

Beside it, on the same rows: DeepSpeed's estimate_zero2/3_model_states_mem_needs (their figure of one GPU) and Accelerate's
estimate_training_usage (model, gradients and optimiser together, for a batch of one), both fed with the parameters that they would count.
"""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE))

from harness.run import git_commit, library_versions  # noqa: E402

MIB = 2**20
AIM_MEDIAN, AIM_UNDER = 0.05, 0.10
BUCKET = 1_000_000
"""Of DeepSpeed's JSON on a CPU: by default its bucket takes a GB of a model of four million weights, and nothing else would be measured."""
TORCH_TILE = 7
"""On a CPU TRL's tile is computed by operations of torch in place of one kernel, which hold so many copies of it in float32; the plan is
given them, because they are no part of what it plans."""
TIMEOUT_S = 900


@dataclass(frozen=True)
class Size:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    kind: str = "llama"


@dataclass(frozen=True)
class Row:
    size: Size
    method: str
    """full, lora, qlora."""
    backend: str
    ranks: int
    rows: int
    length: int
    accumulation: int = 1
    checkpointing: bool = False
    dtype: str = "auto"
    bf16: bool = True
    dropout: float = 0.0

    @property
    def name(self) -> str:
        size = self.size
        model = f"{size.kind} {size.hidden}x{size.intermediate}x{size.layers}"
        words = [model, self.method, f"{self.backend}x{self.ranks}", f"{self.rows}x{self.length}"]
        words += [f"accumulates {self.accumulation}"] * (self.accumulation > 1) + ["checkpointing"] * self.checkpointing
        return " ".join(words + ["float32"] * (not self.bf16) + ["dropout"] * (self.dropout > 0))


def grid(device: str) -> list[Row]:
    if device == "cuda":
        return _gpu_grid()
    small = Size(256, 704, 4, 8, 4, 1024)
    qwen = Size(256, 512, 4, 4, 2, 1024, "qwen3")
    rows = [
        Row(small, "full", "single", 1, 4, 128, checkpointing=checks, bf16=bf16) for checks in (False, True) for bf16 in (True, False)
    ]
    rows += [Row(small, method, "single", 1, 4, 128, checkpointing=checks) for method in ("lora", "qlora") for checks in (False, True)]
    rows += [
        Row(small, "full", "single", 1, 4, 128, accumulation=2),
        Row(small, "full", "single", 1, 8, 256),
        Row(small, "lora", "single", 1, 8, 256, checkpointing=True),
        Row(qwen, "full", "single", 1, 4, 128),
        Row(qwen, "lora", "single", 1, 4, 128),
        Row(small, "full", "ddp", 2, 4, 128),
        Row(small, "lora", "ddp", 2, 4, 128, checkpointing=True),
    ]
    for backend in ("zero1", "zero2", "zero3"):
        rows += [
            Row(small, "full", backend, 2, 4, 128, dtype="bfloat16"),
            Row(small, "full", backend, 2, 4, 128, dtype="bfloat16", accumulation=2, checkpointing=True),
            Row(small, "lora", backend, 2, 4, 128, checkpointing=True),
        ]
    rows += [
        Row(small, "lora", "zero2", 2, 4, 128),
        Row(small, "qlora", "zero2", 2, 4, 128),
        Row(small, "qlora", "zero3", 2, 4, 128, checkpointing=True),
        Row(small, "full", "zero2", 2, 8, 256, dtype="bfloat16"),
    ]
    # TRL's tile is as large for a small model as for a large one; these are fullest elsewhere: in a layer's backward, or in the step.
    wide = Size(256, 12288, 3, 4, 4, 1024)
    rows += [Row(wide, method, "single", 1, 4, 128, checkpointing=True) for method in ("full", "lora", "qlora")]
    rows += [
        Row(wide, "lora", "zero2", 2, 4, 128, checkpointing=True),
        Row(wide, "full", "zero2", 2, 1, 32, dtype="bfloat16"),
        Row(wide, "full", "zero3", 2, 1, 32, dtype="bfloat16"),
        Row(wide, "full", "ddp", 2, 1, 32, accumulation=2),
    ]
    return rows


def _gpu_grid() -> list[Row]:
    sizes = (Size(2048, 5632, 16, 16, 8, 32000), Size(1024, 3072, 24, 16, 8, 128256, "qwen3"))
    rows = [
        Row(size, method, "single", 1, count, length, checkpointing=checks)
        for size in sizes
        for method in ("full", "lora", "qlora")
        for checks in (False, True)
        for count, length in ((2, 1024), (4, 2048))
    ]
    size = sizes[0]
    rows += [Row(size, method, backend, 1, 2, 2048, checkpointing=True) for backend in ("zero2", "zero3") for method in ("full", "lora")]
    return rows + [Row(size, "full", "single", 1, 2, 1024, accumulation=2), Row(size, "lora", "single", 1, 2, 2048, dropout=0.05)]


# ---- what a row is made of


def save_model(row: Row, folder: Path) -> None:
    from sft import Size as TokenizerSize
    from sft import save_tokenizer
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    size = row.size
    config = CONFIG_MAPPING[size.kind](
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.hidden // size.heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(TokenizerSize(min(size.vocabulary, 4096), 0, 0, 0, 0, 0, 0), folder)


def save_recipe(row: Row, folder: Path, device: str) -> Path:
    words = " ".join(["w1"] * (row.length - 4 - 2))
    lines = [
        json.dumps({"messages": [{"role": "user", "content": "w2 w3"}, {"role": "assistant", "content": words}]})
        for _ in range(row.rows * row.ranks * row.accumulation * 2)
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    model = {"name_or_path": str(folder / "model")}
    if row.method == "full":
        model["dtype"] = row.dtype if row.dtype != "auto" else "float32"
    else:
        model |= {"dtype": "bfloat16", "lora": {"r": 16, "alpha": 32, "dropout": row.dropout}}
    if row.method == "qlora":
        model["quantization"] = {"load_in_4bit": True}
    recipe = {
        "task": "sft",
        "model": model,
        "data": {"train": str(folder / "rows.jsonl"), "max_length": row.length, "train_on": "all", "cache_dir": str(folder / "cache")},
        "train": {
            "max_steps": 2,
            "per_device_train_batch_size": row.rows,
            "gradient_accumulation_steps": row.accumulation,
            "gradient_checkpointing": row.checkpointing,
            "bf16": row.bf16,
            "learning_rate": 1e-5,
        },
        "backend": _backend(row, folder) if device == "cpu" else row.backend,
        "tracking": {"mode": "disabled"},
        "output_dir": str(folder / "run"),
    }
    if device == "cuda":
        recipe["data"]["packing"] = False
    (folder / "recipe.yaml").write_text(json.dumps(recipe, indent=2))  # JSON is YAML
    return folder / "recipe.yaml"


def _backend(row: Row, folder: Path) -> str:
    if not row.backend.startswith("zero"):
        return row.backend
    stage = int(row.backend[-1])
    zero = {"stage": stage, "reduce_bucket_size": BUCKET}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    settings = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
    }
    (folder / "deepspeed.json").write_text(json.dumps(settings))
    file = folder / f"{row.backend}.yaml"
    inner = {"deepspeed_config_file": str(folder / "deepspeed.json"), "zero3_init_flag": stage == 3}
    file.write_text(json.dumps({"distributed_type": "DEEPSPEED", "deepspeed_config": inner}))
    return str(file)


# ---- measured


def tensor_counter():
    """A dispatch mode that knows the bytes of all storages that live, and their peak."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Counter(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.live = self.peak = 0
            self._sizes: dict[int, int] = {}

        def note(self, tensor) -> None:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if tensor.device.type == "meta" or key in self._sizes:
                return
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, key)

        def _gone(self, key: int) -> None:
            self.live -= self._sizes.pop(key, 0)

        def note_all(self) -> None:
            gc.collect()
            for thing in gc.get_objects():
                if isinstance(thing, torch.Tensor) and type(thing).__name__ != "FakeTensor":
                    self.note(thing)

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for thing in tree_leaves(result):
                if isinstance(thing, torch.Tensor):
                    self.note(thing)
            return result

    return Counter()


def train_row(recipe: str, device: str, backend: str, rank: int, ranks: int, port: int, result: Path) -> None:
    """One rank, as launch/train.py is one; its peak during the training is left in `result`."""
    if backend != "single":
        # With a world of one Accelerate would wrap a single process in DDP, which `harness run` does not.
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    from harness import rank as program
    from harness.tasks.sft import HarnessSFTTrainer

    original = HarnessSFTTrainer.train

    def train(self, *args, **kwargs):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            answer = original(self, *args, **kwargs)
            peak = torch.cuda.max_memory_allocated()
        else:
            counter = tensor_counter()
            counter.note_all()
            with counter:
                answer = original(self, *args, **kwargs)
            peak = counter.peak
        result.with_suffix(f".{rank}").write_text(str(peak))
        return answer

    HarnessSFTTrainer.train = train
    code = program.main(["--recipe", recipe, "--smoke"])
    sys.stdout.flush()
    os._exit(code)


def measure(row: Row, folder: Path, device: str) -> int:
    """The peak of the fullest rank, in bytes."""
    recipe, result = save_recipe(row, folder, device), folder / "peak"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if device == "cuda":
        argv = [sys.executable, __file__, "--train", str(recipe), row.backend, "--port", str(port), "--peak", str(result)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    else:
        context = multiprocessing.get_context("fork")
        arguments = [(str(recipe), device, row.backend, rank, row.ranks, port, result) for rank in range(row.ranks)]
        processes = [context.Process(target=train_row, args=each) for each in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT_S)
        assert [process.exitcode for process in processes] == [0] * row.ranks, f"{row.name}: ranks failed; see {folder}"
    return max(int(result.with_suffix(f".{rank}").read_text()) for rank in range(row.ranks))


# ---- planned


def planned(row: Row, recipe_file: Path, device: str):
    """(the plan's memory without what no counter sees, the parameters)."""
    from harness.planner.architecture import load_architecture
    from harness.planner.memory import plan_memory
    from harness.planner.setting import NOTHING, Range, Setting
    from harness.recipe import load
    from harness.recipe.backend import load_backend

    recipe = load(recipe_file)
    shape = load_architecture(recipe.model.name_or_path)
    setting = Setting(
        recipe, load_backend(recipe.backend), shape, row.ranks, 1, bf16_hardware=device == "cuda", runtime=NOTHING, slack=(0, 0, 0)
    )
    memory = plan_memory(setting)
    if device == "cpu":
        tokens = min(4096, row.rows * row.length)
        extra = Range.exact(TORCH_TILE * 4 * tokens * min(shape.vocabulary, 32768))
        for moment in ("loss", "forward"):
            if moment in memory.moments:
                memory.moments[moment]["torch's tile"] = extra
    return memory, shape


def estimators(row: Row, shape) -> dict[str, int]:
    """What two others say of the same row, in bytes of one GPU."""
    from accelerate.commands.estimate import estimate_training_usage
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    # AutoModel has no head of its own.
    usage = estimate_training_usage(4 * (shape.parameters - shape.head), "bfloat16" if row.bf16 else "float32")
    found = {"accelerate": usage["step"] if not row.bf16 else usage["model"] + usage["gradients"] + usage["optimizer"]}
    if row.backend in ("zero1", "zero2"):
        found["deepspeed"] = estimate_zero2_model_states_mem_needs(shape.parameters, row.ranks, 1, cpu_offload=False)[1]
    if row.backend == "zero3":
        largest = max(shape.embedding, max(matrix.weights for matrix in shape.matrices))
        found["deepspeed"] = estimate_zero3_model_states_mem_needs(shape.parameters, largest, row.ranks, 1, cpu_offload=False)[1]
    return found


# ---- results


def run(device: str, work: Path, wanted: str | None) -> dict:
    began, results = time.perf_counter(), []
    rows = [row for row in grid(device) if wanted is None or wanted in row.name]
    if device == "cpu":
        # Loaded once, and forked.
        import deepspeed  # noqa: F401
        import peft  # noqa: F401
        import trl  # noqa: F401

        import harness.tasks.sft  # noqa: F401
    for number, row in enumerate(rows):
        folder = work / f"row-{number}"
        folder.mkdir(parents=True)
        save_model(row, folder / "model")
        try:
            peak = measure(row, folder, device)
        except Exception:  # noqa: BLE001 - a row that fails is a result too
            traceback.print_exc()
            results.append({"row": row.name, "settings": asdict(row), "failed": True})
            continue
        memory, shape = planned(row, folder / "recipe.yaml", device)
        expected = memory.peak.expected
        results.append(
            {
                "row": row.name,
                "settings": asdict(row),
                "measured_bytes": peak,
                "planned_bytes": {name: round(getattr(memory.peak, name)) for name in ("low", "expected", "high")},
                "deciding": memory.deciding,
                "parts": {moment: {k: round(v.expected) for k, v in parts.items()} for moment, parts in memory.moments.items()},
                "error": round(expected / peak - 1, 4),
                "others": {name: {"bytes": size, "error": round(size / peak - 1, 4)} for name, size in estimators(row, shape).items()},
            }
        )
        say(f"{row.name:60} measured {peak / MIB:9.1f} MiB, planned {expected / MIB:9.1f} ({expected / peak - 1:+.1%}), {memory.deciding}")
    return {
        "device": device,
        "machine": _machine(device),
        "git_commit": git_commit(),
        "versions": library_versions(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "seconds": round(time.perf_counter() - began),
        "summary": summary(results),
        "rows": results,
    }


def _machine(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def summary(results: list[dict]) -> dict:
    done = [row for row in results if not row.get("failed")]
    found = {"rows": len(results), "failed": len(results) - len(done), "plan": _errors([row["error"] for row in done])}
    for name in ("deepspeed", "accelerate"):
        errors = [row["others"][name]["error"] for row in done if name in row["others"]]
        if errors:
            found[name] = _errors(errors)
    return found


def _errors(errors: list[float]) -> dict:
    return {
        "rows": len(errors),
        "median_absolute_percent": round(100 * statistics.median(map(abs, errors)), 2),
        "worst_under_percent": round(-100 * min([*errors, 0]), 2),
        "worst_over_percent": round(100 * max([*errors, 0]), 2),
        "under_by_more_than_10_percent": sum(error < -AIM_UNDER for error in errors),
    }


def render(result: dict) -> str:
    found, plan = result["summary"], result["summary"]["plan"]
    counted = "torch.cuda.max_memory_allocated" if result["device"] == "cuda" else "bytes of tensors, counted on a CPU"
    met = plan["median_absolute_percent"] <= 100 * AIM_MEDIAN and not plan["under_by_more_than_10_percent"]
    lines = [
        f"# `harness plan` beside the peak of a training ({counted})",
        "",
        f"{result['date']}, commit {result['git_commit']}. {result['machine']}; {result['seconds']} s.",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        "",
        f"{found['rows']} rows, {found['failed']} failed. Error: estimate / measured - 1.",
        "",
        "| | rows | median of the error's size | furthest under | furthest over | under by more than 10 % |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("plan", "deepspeed", "accelerate"):
        if name in found:
            each = found[name]
            lines.append(
                f"| {'harness plan' if name == 'plan' else name} | {each['rows']} | {each['median_absolute_percent']:.1f} % | "
                f"{each['worst_under_percent']:.1f} % | {each['worst_over_percent']:.1f} % | {each['under_by_more_than_10_percent']} |"
            )
    lines += ["", f"Aim: median within 5 %, none under by more than 10 %. {'Met' if met else 'Not met'}.", ""]
    if result["device"] == "cpu":
        lines += [
            "Not a GPU: kernels, their workspaces and the allocator are left out. DeepSpeed's estimate is of model states alone,",
            "Accelerate's of a full training on one device; both are shown also where they have nothing to say of adapters or activations,",
            "because that is what someone gets who asks them.",
            "",
        ]
    lines += ["| row | measured, MiB | planned | error | DeepSpeed | Accelerate |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        if row.get("failed"):
            lines.append(f"| {row['row']} | failed | | | | |")
            continue
        others = [f"{row['others'][name]['error']:+.0%}" if name in row["others"] else "" for name in ("deepspeed", "accelerate")]
        planned_mib = row["planned_bytes"]["expected"] / MIB
        lines.append(
            f"| {row['row']} | {row['measured_bytes'] / MIB:.1f} | {planned_mib:.1f} | {row['error']:+.1%} | {others[0]} | {others[1]} |"
        )
    return "\n".join(lines) + "\n"


def say(text: str) -> None:
    print(text, flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/planner.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="left out: cuda where there is a GPU")
    parser.add_argument("--results", type=Path, help="folder for planner-<cpu|gpu>.{json,md}; left out: benchmarks/results")
    parser.add_argument("--work", type=Path, help="keep models and runs here; left out: a temporary folder")
    parser.add_argument("--rows", help="only rows whose name holds this; with --results")
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.train:
        train_row(options.train[0], "cuda", options.train[1], 0, 1, options.port, options.peak)
    if options.rows and options.results is None:
        parser.error("--rows is a trial: give --results FOLDER, so that it replaces no measurement")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this machine has no GPU that torch can use; leave it out to count on the CPU")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="bench-planner-") as scratch:
        result = run(device, options.work.resolve() if options.work else Path(scratch), options.rows)
    results = options.results or HERE / "results"
    target = results / f"planner-{'gpu' if device == 'cuda' else 'cpu'}"
    from sft import save_result

    save_result(result, render(result), target)


if __name__ == "__main__":
    main()
