"""What benchmarks/data.py starts in a process of its own: one side, one set of rows, from the file to the packs; prints one line of JSON.

    python benchmarks/data_sides.py harness FOLDER
    python benchmarks/data_sides.py trl FOLDER NUM_PROC

FOLDER has raw.jsonl (xLAM's layout) and tokenizer/. Imports are not in the seconds of either side.

harness   convert, validate and prepare as the commands of these names call them.
trl       load_dataset and a `map` that makes messages of the rows, as a user writes it; then SFTTrainer's own `_prepare_dataset` with
          assistant_only_loss and packing. Nothing is checked, as TRL checks nothing.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

MAX_LENGTH = 2048


class Clock:
    """Seconds of the stages of this process. Those of an inner stage are taken out of the one around it."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._inner = 0.0

    @contextlib.contextmanager
    def stage(self, name: str):
        began, outer, self._inner = time.perf_counter(), self._inner, 0.0
        yield
        whole = time.perf_counter() - began
        self.seconds[name] = self.seconds.get(name, 0.0) + whole - self._inner
        self._inner = outer + whole

    def around(self, name: str, function):
        def timed(*args, **kwargs):
            with self.stage(name):
                return function(*args, **kwargs)

        return timed


def counts_of(packs) -> dict:
    """Of packs that are read a few at a time: rows and tokens in them."""
    found = {"rows": 0, "tokens": 0, "trained_tokens": 0, "packs": packs.num_rows}
    for batch in packs.with_format("arrow").iter(1000):
        labels = batch["labels"].combine_chunks().flatten()
        found["rows"] += len(batch["seq_lengths"].combine_chunks().flatten())
        found["tokens"] += len(labels)
        found["trained_tokens"] += int((labels.to_numpy() != -100).sum())
    return found


def harness_side(folder: Path, num_proc: None, said) -> dict:
    from harness.data import prepare, prepare_recipe
    from harness.data.audit import File, audit, plan_actions
    from harness.data.convert import convert
    from harness.data.findings import CLASSES
    from harness.model import load_tokenizer
    from harness.recipe import load
    from harness.tasks.templates import training_template

    clock, messages, recipe = Clock(), folder / "messages.jsonl", folder / "recipe.yaml"
    data = {"train": str(messages), "max_length": MAX_LENGTH, "packing": True, "cache_dir": str(folder / "cache")}
    recipe.write_text(json.dumps({"model": {"name_or_path": str(folder / "tokenizer")}, "data": data}))  # JSON is YAML
    recipe = load(recipe)
    tokenizer = load_tokenizer(recipe)
    prepare._tokenise, prepare._pack = clock.around("tokenise", prepare._tokenise), clock.around("pack", prepare._pack)
    said("ready")
    with clock.stage("convert"):
        convert(str(folder / "raw.jsonl"), "messages", messages, force=True)
    said("converted")
    with clock.stage("validate"):
        report = audit([File(str(messages))], plan_actions([]))
    assert not report.failed and not report.fate, "rows that are dropped would not be the other side's"
    assert set(report.found) <= set(CLASSES)
    said("validated")
    with clock.stage("read"):
        prepared = prepare_recipe(recipe, tokenizer, packing=True, training_template=training_template, say=said)
    said("done")
    return {"seconds": clock.seconds, "counts": counts_of(prepared.train), "near_duplicates": near_of(report)}


def near_of(report) -> int:
    return report.found["near_duplicate"].rows if "near_duplicate" in report.found else 0


def to_messages(row: dict) -> dict:
    """What a user writes for xLAM's rows; the tools as JSON text, which TRL reads, as Arrow would fill them with nulls."""
    tools = [{"type": "function", "function": tool} for tool in json.loads(row["tools"])]
    calls = [{"type": "function", "function": call} for call in json.loads(row["answers"])]
    messages = [{"role": "user", "content": row["query"]}, {"role": "assistant", "content": "", "tool_calls": calls}]
    return {"messages": messages, "tools": json.dumps(tools)}


def trl_side(folder: Path, num_proc: int, said) -> dict:
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    from trl.trainer import sft_trainer

    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    clock, several = Clock(), num_proc if num_proc > 1 else None
    trainer = object.__new__(SFTTrainer)  # its preparation without a model
    trainer._tokenizer, trainer.chat_template, trainer.completion_only_loss = (
        AutoTokenizer.from_pretrained(folder / "tokenizer"), None, False,
    )  # fmt: skip
    trainer.args = SFTConfig(
        str(folder / "run"), max_length=MAX_LENGTH, packing=True, assistant_only_loss=True, dataset_num_proc=several, use_cpu=True,
        bf16=False, report_to="none",
    )  # fmt: skip
    sft_trainer.pack_dataset = clock.around("pack", sft_trainer.pack_dataset)

    def prepare(rows, name: str):
        with clock.stage(name):
            return trainer._prepare_dataset(rows, trainer._tokenizer, trainer.args, True, None, "train")

    said("ready")
    with clock.stage("map"):
        raw = datasets.load_dataset("json", data_files=str(folder / "raw.jsonl"), split="train", cache_dir=str(folder / "cache"))
        features = datasets.Features({"messages": datasets.List(datasets.Json()), "tools": datasets.Value("string")})
        rows = raw.map(to_messages, remove_columns=raw.column_names, features=features, num_proc=several)
    said("mapped")
    packs = prepare(rows, "tokenise")
    said("done")
    return {"seconds": clock.seconds, "counts": counts_of(packs)}


SIDES = {"harness": harness_side, "trl": trl_side}


def main() -> None:
    name, folder, *num_proc = sys.argv[1:]
    cpu_s: list[float] = []

    def said(text: str) -> None:
        cpu_s.append(sum(os.times()[:4]))  # its own, and of children that have ended
        print(f"# {text}", flush=True)

    result = SIDES[name](Path(folder), int(num_proc[0]) if num_proc else None, said)
    print(json.dumps(result | {"cpu_s": cpu_s[-1] - cpu_s[0]}), flush=True)


if __name__ == "__main__":
    main()
