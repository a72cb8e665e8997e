"""Whole steps, for distill.py: `harness run` from a cache and beside a resident teacher, and TRL's trainers, on the same models and rows.

The sides are processes of their own and take turns, one optimiser step each (sft.py: race). All rows are equally long, so that no side has
padding; seven eighths of each are trained. Precision, attention, optimiser, batch and order are the same everywhere. Where two sides have
the same loss by different code, its value must be the same at every step, or there is no result.
"""

import json
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from sft import Side, Step, race, save_tokenizer, spread

HERE = Path(__file__).resolve().parent
SEED = 7
SKIP = 2
"""Steps at the start that do not count: allocators and caches fill."""
TEACHER_SPREAD = 8.0
"""Standard deviation of the teacher's logits: few tokens hold most of a distribution, as a trained teacher's do."""
TOLERANCE = {"cpu": 1e-4, "gpu": 2e-2}
"""Relative; on a GPU both models run in bfloat16, which no two orders of summing round alike."""
CACHED, KL, JSD = "harness, cached", "forward KL", "Jensen-Shannon"


@dataclass(frozen=True)
class Size:
    """Models as keywords of LlamaConfig, and rows."""

    student: dict
    teacher: dict
    vocabulary: int
    context: int
    batch: int
    steps: int
    unit_tokens: int
    at_once: bool
    """All sides in one race; else, where the device cannot hold so many teachers, each beside the cached one alone."""

    @property
    def rows(self) -> int:
        return self.batch * self.steps


def llama(hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int, tied: bool = False) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "tie_word_embeddings": tied,
    }


SIZES = {
    "cpu": Size(llama(128, 384, 4, 4, 4), llama(384, 1024, 8, 6, 6), 32_000, 256, 4, 10, 2048, at_once=True),
    # The shapes of Llama-3.2-1B and Llama-3.1-8B.
    "gpu": Size(llama(2048, 8192, 16, 32, 8, tied=True), llama(4096, 14336, 32, 32, 8), 128_256, 4096, 2, 20, 65_536, at_once=False),
}


# ---- what all sides are given


def save_inputs(size: Size, folder: Path, device: str) -> dict[str, int]:
    """Tokenizer, student, teacher and rows; returns the models' parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    parameters = {}
    for name, shape in (("student", size.student), ("teacher", size.teacher)):
        torch.manual_seed(SEED)
        dtype = torch.bfloat16 if device == "cuda" and name == "teacher" else torch.float32
        marks = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
        config = LlamaConfig(vocab_size=size.vocabulary, max_position_embeddings=size.context, **marks, **shape)
        with torch.device(device):
            model = LlamaForCausalLM._from_config(config, dtype=dtype)
        if name == "teacher":
            torch.nn.init.normal_(model.lm_head.weight, std=TEACHER_SPREAD * config.hidden_size**-0.5)
        parameters[name] = model.num_parameters()
        model.save_pretrained(folder / name)
        save_tokenizer(size, folder / name)
    (folder / "rows").mkdir()
    (folder / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(size)))
    return parameters


def make_rows(size: Size) -> list[dict]:
    """Two turns of `context` tokens together, each with a mark before and an end behind it."""
    rng = random.Random(SEED)

    def words(count: int) -> str:
        return " ".join(f"w{rng.randrange(size.vocabulary - 8)}" for _ in range(count))

    asked = size.context // 8
    lengths = {"user": asked - 3, "assistant": size.context - asked - 1}
    return [{"messages": [{"role": role, "content": words(count)} for role, count in lengths.items()]} for _ in range(size.rows)]


def recipe_of(folder: Path, size: Size, kind: str, *, divergence: str = "forward_kl", source: str = "cache") -> dict:
    """folder: of the inputs."""
    train = {"max_steps": size.steps, "learning_rate": 1e-4, "lr_scheduler_type": "constant", "logging_steps": 1, "seed": SEED}
    train |= {"optim": "adamw_torch_fused", "max_grad_norm": 1.0, "gradient_checkpointing": False, "bf16": kind == "gpu"}
    teacher = {"name_or_path": str(folder / "teacher"), "source": source, "attn_implementation": "sdpa"}
    if source == "cache":
        teacher |= {"cache": str(folder / "cache"), "unit_tokens": size.unit_tokens}
    return {
        "task": "distill",
        "model": {"name_or_path": str(folder / "student"), "attn_implementation": "sdpa"},
        "teacher": teacher,
        # No cross-entropy: GKD has none.
        "distill": {"weight": 1.0, "divergence": divergence},
        "data": {
            "train": str(folder / "rows" / "train.jsonl"),
            "max_length": size.context,
            "packing": False,
            "cache_dir": str(folder / "data"),
        },
        "train": train | {"per_device_train_batch_size": size.batch},
        "checkpoint": {"auto": False},
        "tracking": {"mode": "disabled"},
    }


# ---- the sides


def harness_side(name: str, folder: Path, inputs: Path, size: Size, kind: str, **how: str) -> Side:
    folder.mkdir(parents=True)
    recipe = recipe_of(inputs, size, kind, **how) | {"output_dir": str(folder / "run")}
    (folder / "recipe.yaml").write_text(json.dumps(recipe, indent=2))  # JSON is YAML
    return Side(name, [sys.executable, "-m", "harness", "run", str(folder / "recipe.yaml")])


def trl_side(name: str, folder: Path, inputs: Path, size: Size, kind: str, *, loss: str, beta: float) -> Side:
    folder.mkdir(parents=True)
    train = recipe_of(inputs, size, kind)["train"]
    arguments = {"beta": beta, "max_length": size.context, "report_to": "none", "save_strategy": "no", "output_dir": str(folder / "run")}
    settings = {
        "loss": loss,
        "student": str(inputs / "student"),
        "teacher": str(inputs / "teacher"),
        "student_dtype": "float32",
        "teacher_dtype": "bfloat16" if kind == "gpu" else "float32",
        "rows": str(inputs / "rows" / "train.jsonl"),
        "arguments": train | arguments | {"use_cpu": kind == "cpu"},
    }
    (folder / "settings.json").write_text(json.dumps(settings, indent=2))
    return Side(name, [sys.executable, str(HERE / "distill_trl.py"), str(folder / "settings.json")])


def make_sides(folder: Path, inputs: Path, size: Size, kind: str) -> list[Side]:
    """The cached one first."""
    shared = inputs, size, kind
    return [
        harness_side(CACHED, folder / "cached", *shared),
        harness_side(f"harness, resident, {KL}", folder / "resident-kl", *shared, source="resident"),
        harness_side(f"harness, resident, {JSD}", folder / "resident-jsd", *shared, source="resident", divergence="jsd"),
        trl_side(f"TRL GKD, {KL}", folder / "gkd", *shared, loss="GKD", beta=0.0),
        trl_side(f"TRL chunked, {KL}", folder / "chunked-kl", *shared, loss="chunked", beta=0.0),
        trl_side(f"TRL chunked, {JSD}", folder / "chunked-jsd", *shared, loss="chunked", beta=0.5),
    ]


# ---- measured


def measure_steps(folder: Path, size: Size, kind: str) -> dict:
    """Every side's steps, beside the cached one's of the same race. Raises SystemExit when losses that must be the same are not."""
    sides = make_sides(folder / "race-0", folder, size, kind)
    if size.at_once:
        races = [sides]
    else:
        others = [make_sides(folder / f"race-{number}", folder, size, kind) for number in range(1, len(sides))]
        races = [[made[0], made[number]] for number, made in enumerate(others, start=1)]
    for number, raced in enumerate(races):
        race(raced, folder / f"race-{number}", "file")
    losses = {side.name: losses_of(side) for raced in races for side in raced}
    gap = check_losses(losses, TOLERANCE[kind])
    table, seen = [], set()
    for raced in races:
        for side in raced:
            if side.name not in seen:
                table.append(compare(side, raced[0], size))
                seen.add(side.name)
    return {"sides": table, "largest_loss_difference": gap, "losses": losses}


def compare(side: Side, cached: Side, size: Size) -> dict:
    """Tokens are all of a batch's: no row is padded."""
    tokens, steps = size.batch * size.context, side.steps[SKIP:]
    return {
        "side": side.name,
        "tokens_per_s": tokens / spread([step.seconds for step in steps])["median"],
        "step_s": spread([step.seconds for step in steps]),
        "cpu_s": spread([step.cpu_seconds for step in steps]),
        "cached_is_faster": spread(ratios(steps, cached.steps[SKIP:], "seconds")),
        "cached_is_faster_in_cpu_s": spread(ratios(steps, cached.steps[SKIP:], "cpu_seconds")),
        "peak_bytes": side.peak_bytes,
        "first_step_s": side.first_step_s,
    }


def ratios(theirs: list[Step], cached: list[Step], field: str) -> list[float]:
    return [getattr(a, field) / getattr(b, field) for a, b in zip(theirs, cached, strict=True)]


def losses_of(side: Side) -> list[float]:
    """At each step; one is logged after its step, so that the first report has none and the last is not heard of."""
    return [step.loss for step in side.steps[1:]]


def check_losses(losses: dict[str, list[float]], tolerance: float) -> float:
    """The largest relative difference between sides whose names end in the same divergence."""
    gaps = []
    for kind in (KL, JSD):
        first, *others = [values for name, values in losses.items() if name.endswith(kind)]
        for values in others:
            gaps += [abs(a - b) / abs(a) for a, b in zip(first, values, strict=True)]
    known = [a / b for a, b in zip(losses[CACHED], losses[f"harness, resident, {KL}"], strict=True)]
    if not all(gap <= tolerance for gap in gaps):  # which no NaN is
        raise SystemExit(
            f"whole steps: losses that must be the same differ by {max(gaps):.1e}, over {tolerance:.0e}: not the same training"
        )
    if not all(math.isfinite(value) and 0.9 < value < 1 + tolerance for value in known):
        raise SystemExit(f"whole steps: the cached loss is {min(known):.3f} to {max(known):.3f} of the dense one; must be a little less")
    return max(gaps)
