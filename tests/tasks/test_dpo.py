"""DPO by real ranks against a hand-written one in float64: two steps of plain gradient descent, of which the second begins from a policy
that is no longer its reference; and the cache of what a reference says."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.embedded import resolve
from harness.recipe import load
from harness.recipe.backend import load_backend

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "faults"))
from rig import shared_rig  # noqa: E402

BETA, RATE, STEPS, PAIRS = 0.5, 0.05, 2, 8
RECIPE = """
task: dpo
model: {{name_or_path: "embedded:tiny-llama"{lora}}}
data: {{train: [{{path: "embedded:pairs-train", max_rows: {pairs}}}], max_length: 256}}
dpo: {{beta: {beta}}}
train: {{max_steps: {steps}, global_batch_size: {pairs}, per_device_train_batch_size: 2, logging_steps: 1,
        optim: sgd, learning_rate: {rate}, lr_scheduler_type: constant, max_grad_norm: 0}}
checkpoint: {{auto: false}}
tracking: {{mode: disabled}}
output_dir: {run}
"""
LORA = ", lora: {r: 4, alpha: 8, target_modules: [q_proj, v_proj]}"


def train(folder: Path, *overrides: str, lora: str = "", world: int = 1, backend: str = "single", inject: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file, run = folder / "job.yaml", folder / "run"
    file.write_text(RECIPE.format(lora=lora, pairs=PAIRS, beta=BETA, steps=STEPS, rate=RATE, run=run))
    life = shared_rig().run(file, *overrides, world=world, backend=backend, inject=inject)
    assert list(life.codes.values()) == [0] * world, life.output(0)
    (run / "said.txt").write_text(life.output(0))
    return run


def rows_of(run: Path) -> list[dict]:
    folder = Path(json.loads(next(run.glob("logs/attempt-1/prepared-*.json")).read_text())["folder"])
    files = json.loads((folder / "manifest.json").read_text())["files"]["train"]
    return concatenate_datasets([Dataset.from_file(f"{folder}/{file['name']}") for file in files]).to_list()


def logged(run: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


# ---- by hand


def log_probability(model, ids: list[int], labels: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logits[at - 1, label] for at, label in enumerate(labels) if at and label != -100)


def dpo_by_hand(rows: list[dict], adapter: dict[str, torch.Tensor] | None):
    """(losses of the two steps, margins, trained tensors after them). adapter: name of lora_A -> values; None: all weights are trained."""
    base = AutoModelForCausalLM.from_pretrained(resolve("embedded:tiny-llama"), dtype=torch.float64, attn_implementation="eager").eval()
    weights = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    if adapter is None:
        trained = {name: value.clone().requires_grad_() for name, value in weights.items()}
    else:
        trained = {name: value.double().clone().requires_grad_() for name, value in adapter.items()}

    def at(values):
        """The model with these: W, or W + alpha / r B A."""
        if adapter is None:
            whole = values
        else:
            whole = dict(weights)
            for name in adapter:
                if ".lora_A." in name:
                    of = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
                    whole[of] = weights[of] + 2.0 * values[name.replace("lora_A", "lora_B")] @ values[name]
        return lambda **inputs: torch.func.functional_call(base, whole, (), inputs)

    start = at({name: value.detach().clone() for name, value in trained.items()})
    with torch.no_grad():
        reference = [
            [log_probability(start, row[f"{side}_input_ids"], row[f"{side}_labels"]) for side in ("chosen", "rejected")] for row in rows
        ]
    losses, margins = [], []
    for _ in range(STEPS):
        deltas = []
        for row, (ref_chosen, ref_rejected) in zip(rows, reference, strict=True):
            policy = at(trained)
            chosen, rejected = (log_probability(policy, row[f"{side}_input_ids"], row[f"{side}_labels"]) for side in ("chosen", "rejected"))
            deltas.append((chosen - ref_chosen) - (rejected - ref_rejected))
        loss = sum(torch.log1p(torch.exp(-BETA * delta)) for delta in deltas) / len(deltas)
        gradients = torch.autograd.grad(loss, list(trained.values()))
        losses.append(loss.item())
        margins.append(BETA * sum(delta.item() for delta in deltas) / len(deltas))
        trained = {
            name: (value - RATE * gradient).detach().requires_grad_()
            for (name, value), gradient in zip(trained.items(), gradients, strict=True)
        }
    return losses, margins, {name: value.detach() for name, value in trained.items()}


def check_against_hand(run: Path, by_hand, file: str) -> None:
    losses, margins, trained = by_hand
    assert logged(run, "train/loss") == pytest.approx(losses, abs=1e-5)
    assert logged(run, "train/rewards/margins") == pytest.approx(margins, abs=2e-5)
    assert margins[0] == 0 and abs(margins[1]) > 1e-3
    check_weights(run, trained, file)


def check_weights(run: Path, trained: dict[str, torch.Tensor], file: str) -> None:
    after = load_file(run / "final" / file)
    assert after.keys() <= trained.keys()
    for name, value in after.items():
        torch.testing.assert_close(value.double(), trained[name], rtol=1e-4, atol=2e-6, msg=name)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Runs of all weights, by how the reference is asked; the cached one over three ranks of which two have half of the batch each."""
    folder = tmp_path_factory.mktemp("full")
    runs = {name: train(folder / name, f"dpo.reference={name}") for name in ("cached", "resident")}
    return runs, dpo_by_hand(rows_of(runs["cached"]), None)


@pytest.mark.parametrize("reference", ["cached", "resident"])
def test_two_steps_of_all_weights_are_those_by_hand_in_float64(full, reference):
    runs, by_hand = full
    check_against_hand(runs[reference], by_hand, "model.safetensors")


def test_so_they_are_of_a_model_whose_forward_takes_no_arguments_of_a_loss(full, tmp_path):
    """As Gemma 3's says: transformers then divides by the micro-batches of a step once more."""
    says_so = "from transformers import LlamaForCausalLM\nLlamaForCausalLM.accepts_loss_kwargs = False\n"
    check_against_hand(train(tmp_path, "dpo.reference=cached", inject=says_so), full[1], "model.safetensors")


def pairs_around_results(file: Path) -> None:
    """Pairs whose answers both call, are told what came back, and say it; on the wrong side another call, result and words."""
    with open(resolve("embedded:look-up-train"), encoding="utf-8") as source:
        rows = [json.loads(line) for line in itertools.islice(source, PAIRS)]
    lines = []
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        question, *right = row["messages"]
        tools = list({tool["function"]["name"]: tool for tool in row["tools"] + other["tools"]}.values())
        lines.append({"prompt": [question], "chosen": right, "rejected": other["messages"][1:], "tools": tools})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def labels_of(ids: list[int], speakers: tuple[str, ...]) -> list[int]:
    """What these say, told by the marks in the text alone: from a speaker's mark to the end of the turn, that included."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("embedded:tiny-llama"))
    labels, speaks = [], False
    for token, text in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        labels.append(token if speaks else -100)
        speaks = text in speakers or (speaks and text != "<|end|>")
    return labels


def test_nothing_is_learnt_from_tool_results_between_the_words_of_a_pair(tmp_path):
    """By hand, of labels that no mask has made; with the results in them it would be another model."""
    pairs_around_results(tmp_path / "pairs.jsonl")
    run = train(tmp_path, "dpo.reference=cached", f'data.train=[{{path: "{tmp_path}/pairs.jsonl"}}]', "data.max_length=400")
    rows = rows_of(run)

    def by_hand(*speakers: str):
        sides = ("chosen", "rejected")
        labelled = [{f"{side}_labels": labels_of(row[f"{side}_input_ids"], speakers) for side in sides} for row in rows]
        return dpo_by_hand([row | labels for row, labels in zip(rows, labelled, strict=True)], None)

    check_against_hand(run, by_hand("<|assistant|>"), "model.safetensors")
    # The results differ, so a label on them would show.
    with pytest.raises(AssertionError):
        check_weights(run, by_hand("<|assistant|>", "<|tool|>")[2], "model.safetensors")


def fresh_adapter(run: Path) -> dict[str, torch.Tensor]:
    """As the run's seed draws it, by PEFT."""
    from harness import model as models
    from harness.model.export import adapter_shapes

    recipe = load(run / "recipe.yaml")
    base = AutoModelForCausalLM.from_pretrained(resolve("embedded:tiny-llama"), dtype=torch.float32)
    torch.manual_seed(recipe.train.seed)
    adapted = models.attach_adapter(base, recipe, load_backend("single"), "float32")
    named = {name.replace(".default", ""): value.detach().clone() for name, value in adapted.named_parameters() if value.requires_grad}
    assert named.keys() == adapter_shapes(adapted).keys()
    return named


@pytest.mark.parametrize("reference", ["auto", "cached"])
def test_two_steps_of_an_adapter_are_those_by_hand_whether_it_is_switched_off_or_the_base_was_asked_before(tmp_path, reference):
    run = train(tmp_path, f"dpo.reference={reference}", lora=LORA)
    adapter = fresh_adapter(run)
    check_against_hand(run, dpo_by_hand(rows_of(run), adapter), "adapter_model.safetensors")


@pytest.mark.slow
def test_so_they_are_under_zero3_with_activations_that_are_computed_anew(tmp_path):
    """Reentrant checkpointing, which the reference's pass switches off and on again."""
    run = train(tmp_path, "train.gradient_checkpointing=true", lora=LORA, world=2, backend="zero3")
    check_against_hand(run, dpo_by_hand(rows_of(run), fresh_adapter(run)), "adapter_model.safetensors")


def test_a_policy_that_continues_an_adapter_is_compared_with_that_adapter(tmp_path):
    """Its reference is not the base: from the base, the margin of the first step would not be 0."""
    first = train(tmp_path / "first", lora=LORA)
    second = train(tmp_path / "second", f"model.adapter={first / 'final'}", "train.learning_rate=0.05")
    begun = load_file(first / "final" / "adapter_model.safetensors")
    check_against_hand(second, dpo_by_hand(rows_of(second), begun), "adapter_model.safetensors")


@pytest.mark.parametrize("metric", ["eval/rewards/accuracies", "eval/logps/accuracies"])
def test_the_best_model_may_be_that_of_a_metric_with_a_slash_in_its_name(tmp_path, metric):
    asked = [f"train.metric_for_best_model={metric}", "train.eval_steps=1"]
    run = train(tmp_path, "data.eval_rows=3", "train.global_batch_size=2", *asked, lora=LORA)
    accuracies = logged(run, metric)
    best = json.loads((run / "final" / "harness.json").read_text())["step"]
    assert len(accuracies) == STEPS and accuracies[best - 1] == max(accuracies)


# ---- the cache


def tables(cache: Path) -> dict[str, bytes]:
    return {file.parent.name: file.read_bytes() for file in cache.glob("references/*/reference.arrow")}


@pytest.fixture
def apart(tmp_path, monkeypatch):
    """apart(name) -> a cache of its own from here on."""

    def set_cache(name: str) -> Path:
        monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / name))
        return tmp_path / name

    return set_cache


def test_a_reference_that_three_ranks_computed_is_read_by_two_and_is_what_one_computes(tmp_path, apart):
    cache = apart("three")
    more = "data.train.0.max_rows=30"
    batch = ["train.global_batch_size=12", "train.per_device_train_batch_size=2"]
    three = train(tmp_path / "a", more, *batch, world=3, backend="ddp")
    assert "computes log-probabilities of 30 rows once" in (three / "said.txt").read_text()
    before = tables(cache)
    two = train(tmp_path / "b", more, *batch, "dpo.beta=0.1", world=2, backend="ddp")
    assert "reference: read from" in (two / "said.txt").read_text() and tables(cache) == before
    assert not list(cache.glob("references/*.parts"))
    alone = apart("one")
    train(tmp_path / "c", more, *batch)
    assert list(tables(alone).values()) == list(before.values())
    # And it is what the model says, in float64 and one answer at a time.
    model = AutoModelForCausalLM.from_pretrained(resolve("embedded:tiny-llama"), dtype=torch.float64).eval()
    found = Dataset.from_file(str(next(alone.glob("references/*/reference.arrow"))))
    for row, said in zip(rows_of(three)[:6], found, strict=False):
        for side in ("chosen", "rejected"):
            with torch.no_grad():
                expected = log_probability(model, row[f"{side}_input_ids"], row[f"{side}_labels"]).item()
            assert sum(said[f"{side}_reference"]) == pytest.approx(expected, abs=1e-4)


def change_values(cache: Path, nats: float) -> Path:
    """Of a finished cache, on the disk."""
    import pyarrow as pa

    file = next(cache.glob("references/*/reference.arrow"))
    table = pa.ipc.open_stream(file.read_bytes()).read_all()
    wrong = {
        name: pa.ListArray.from_arrays(
            column.combine_chunks().offsets, pa.array(column.combine_chunks().values.to_numpy() + np.float32(nats))
        )
        for name, column in zip(table.column_names, table.columns, strict=True)
    }
    changed = pa.table(wrong)
    with pa.OSFile(str(file), "wb") as stream, pa.ipc.new_stream(stream, changed.schema) as writer:
        writer.write_table(changed)
    return file


def test_a_cache_that_is_not_of_the_model_that_the_run_begins_from_is_found_out_before_any_lifes_first_step(tmp_path, apart):
    from rig import die_at_call

    cache = apart("planted")
    for name in ("cut", "second"):
        (tmp_path / name).mkdir()
        text = RECIPE.format(lora="", pairs=PAIRS, beta=BETA, steps=STEPS, rate=RATE, run=tmp_path / name / "run")
        (tmp_path / name / "job.yaml").write_text(text.replace("{auto: false}", "{auto: false, every_steps: 1}"))

    def live(name: str, inject: str = "", code: int = 1) -> str:
        life = shared_rig().run(tmp_path / name / "job.yaml", world=1, backend="single", inject=inject)
        assert list(life.codes.values()) == [code], life.output(0)
        return life.output(0)

    # Killed in its second step, of four micro-batches each.
    live("cut", die_at_call(0, "harness.tasks.trainer:HarnessTrainer.training_step", 6), -9)
    file = change_values(cache, -0.5)
    said = live("second")
    assert "a token is 0.5 nats more or less probable to it than to the policy before its first step" in said and str(file.parent) in said
    said = live("cut")
    assert f"{file.parent}: gives a token of the first rows" in said and "when the run began" in said


def test_a_pass_that_was_killed_goes_on_with_the_parts_that_are_there(tmp_path, apart):
    from rig import die_at_call

    cache = apart("killed")
    job = tmp_path / "job.yaml"
    job.write_text(RECIPE.format(lora="", pairs=70, beta=BETA, steps=STEPS, rate=RATE, run=tmp_path / "run"))
    small_parts = "import harness.tasks.reference; harness.tasks.reference.BATCHES_PER_PART = 4\n"
    life = shared_rig().run(
        job,
        "train.global_batch_size=2",
        world=1,
        backend="single",
        inject=small_parts + die_at_call(0, "harness.tasks.reference:_write_part", 4),
    )
    assert list(life.codes.values()) == [-9]
    done = sorted(file.name for file in cache.glob("references/*.parts/*.npz"))
    assert len(done) == 3
    count = "import harness.tasks.reference as r\n" + (
        "def around(f):\n    def g(*a):\n        keep('parts', {'part': a[1]})\n        return f(*a)\n    return g\n"
        "wrap('harness.tasks.reference:_write_part', around)\n"
    )
    life = shared_rig().run(job, "train.global_batch_size=2", world=1, backend="single", inject=small_parts + count)
    assert list(life.codes.values()) == [0], life.output(0)
    assert [record["part"] for record in life.records("parts", 0)] == list(range(3, 9))
    assert len(tables(cache)) == 1


@pytest.mark.parametrize("reference", ["cached", "resident"])
def test_a_reference_of_weights_in_float32_computes_in_the_policys_autocast(tmp_path, reference):
    """The two are one model before the first step, to the last bit: in bfloat16 wholly it would be off by a hundredth of a nat a token."""
    alone = ["train.per_device_train_batch_size=1", "train.global_batch_size=1"]  # a row is padded alike in both passes, so it rounds alike
    run = train(tmp_path, f"dpo.reference={reference}", "train.bf16=true", "model.dtype=float32", "train.max_steps=1", *alone)
    assert logged(run, "train/kl")[0] < 1e-9
