"""A reward model: what its loss divides by, what is logged, where a score is read, and what an export gives."""

import copy
import functools
import json
import shutil
import sys
from pathlib import Path

import numpy
import pytest
import torch
from datasets import Dataset, Features, List, Value
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from harness.checkpoint.cadence import Cadence
from harness.checkpoint.door import Door, Signals
from harness.data.order import EpochOrder
from harness.data.store import load_prepared
from harness.embedded import resolve
from harness.errors import ModelError
from harness.guard import Guard
from harness.model.reward import RewardModel, load_reward_model, settle_pad
from harness.recipe import load
from harness.recipe.backend import load_backend
from harness.recipe.schema import Checkpoint
from harness.run import RankReport
from harness.tasks import reward
from harness.tasks.arguments import training_arguments
from harness.tasks.lives import Lives
from harness.tasks.trainer import pad_for_ranks, with_filler
from harness.tracking.throughput import Throughput

sys.path.append(str(Path(__file__).resolve().parents[1] / "faults"))

from rig import shared_rig  # noqa: E402

VOCABULARY = 200
IDS = List(Value("int32"))
FEATURES = Features(
    {f"{side}_{what}": IDS for side in ("chosen", "rejected") for what in ("input_ids", "labels")}
    | {"margin": Value("float32"), "length": Value("int32"), "sample": Value("string"), "location": Value("string")}
)
RECIPE = """
task: reward
model: {name_or_path: "embedded:tiny-llama"}
data: {train: rows.jsonl, eval: held-out.jsonl}
train: {per_device_train_batch_size: 4, max_steps: 1, logging_steps: 1, eval_steps: 1, learning_rate: 1e-3}
"""


def pairs_of(lengths, margins=None, seed=0) -> Dataset:
    """Random pairs of about these lengths, the second answer of which is another one."""
    draws = torch.Generator().manual_seed(seed)
    rows = []
    for index, length in enumerate(lengths):
        row = {"margin": margins[index] if margins else None, "sample": str(index), "location": f"rows:{index}"}
        for side, size in (("chosen", length), ("rejected", length + index % 3)):
            ids = torch.randint(10, VOCABULARY, (size,), generator=draws).tolist()
            row |= {f"{side}_input_ids": ids, f"{side}_labels": [-100, *ids[1:]]}
        rows.append(row | {"length": length + index % 3})
    return Dataset.from_list(rows, features=FEATURES)


def plain_scores(model, rows: Dataset) -> tuple[numpy.ndarray, numpy.ndarray]:
    """One row at a time, read at its last token by hand."""
    model.eval()

    def score(ids):
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            return (hidden.double() @ model.score.weight[0].double()).item()

    return tuple(numpy.array([score(row[f"{side}_input_ids"]) for row in rows]) for side in ("chosen", "rejected"))


def log1pexp(value):
    return numpy.log1p(numpy.exp(value))


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(resolve("embedded:tiny-llama"), num_labels=1, dtype=torch.float32)


@pytest.fixture
def build(base, tmp_path):
    """build(train rows, held-out rows, *overrides) -> trainer, of a model that is the same each time"""
    weights = {name: value.clone() for name, value in base.state_dict().items()}

    def build(train, held_out, *overrides):
        (tmp_path / "recipe.yaml").write_text(RECIPE)
        base.load_state_dict(weights)
        recipe = load(
            str(tmp_path / "recipe.yaml"), ["data.eval=[]", "train.eval_steps=null", *overrides] if held_out is None else overrides
        )
        arguments = training_arguments(recipe, load_backend("single"), tmp_path / "run", 1, has_gpu=False, bf16_hardware=False)
        args, tokenizer = reward.build_arguments(recipe, arguments, flattens=False), AutoTokenizer.from_pretrained(resolve(TINY))
        trainer = reward.build_trainer(args, base, tokenizer, train, held_out, [])
        trainer.configure(throughput=Throughput())
        of_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        order = EpochOrder(len(train), of_a_step, args.seed)
        if order.missing:
            trainer.train_dataset = with_filler(train, 1).rename_columns(reward.COLUMNS)
        trainer.live(
            Lives(
                committer=None,
                cadence=Cadence(Checkpoint(auto=False), 1, now=0),
                door=Door(Signals(), None),
                guard=Guard(recipe.guard, fp16=False),
                order=order,
                report=RankReport(0),
                facts={},
                tracking=None,
            )
        )
        return trainer

    yield build
    base.load_state_dict(weights)


TINY = "embedded:tiny-llama"


def logged(trainer, key) -> list:
    return [line[key] for line in trainer.state.log_history if key in line]


# ---- the loss


def test_a_step_of_several_micro_batches_and_filling_rows_is_the_gradient_of_the_mean_over_its_pairs(build, base):
    """Six pairs and a global batch of eight, once as two micro-batches of four and once as eight of one."""
    margins = [0.5, None, 0.0, 2.0, None, 1.0]
    rows = pairs_of([5, 40, 9, 33, 12, 3], margins)
    chosen, rejected = plain_scores(base, rows)
    expected = log1pexp(-(chosen - rejected - numpy.array([margin or 0.0 for margin in margins]))) + 0.1 * (chosen + rejected) ** 2
    gradients = {}
    for size in (4, 1):
        trainer = build(
            rows,
            None,
            f"train.per_device_train_batch_size={size}",
            f"train.gradient_accumulation_steps={8 // size}",
            "reward.center_rewards_coefficient=0.1",
            "train.optim=sgd",
            "train.max_grad_norm=1e9",
            "train.learning_rate=1.0",
        )
        before = {name: value.clone() for name, value in base.named_parameters()}
        trainer.train()
        gradients[size] = {name: before[name] - value.detach() for name, value in base.named_parameters()}
        assert logged(trainer, "loss")[0] == pytest.approx(expected.mean(), rel=1e-4)
        assert logged(trainer, "accuracy")[0] == (chosen > rejected).mean()
        assert logged(trainer, "margin")[0] == pytest.approx((chosen - rejected).mean(), rel=1e-4)
        assert logged(trainer, "chosen_reward_std")[0] == pytest.approx(chosen.std(), rel=1e-4)
    for name, value in gradients[4].items():
        assert torch.allclose(value, gradients[1][name], atol=2e-6), name
    exact = copy.deepcopy(base).double()
    exact.load_state_dict({name: before[name].double() for name in before}, strict=False)
    total = 0.0
    for row, margin in zip(rows, margins, strict=True):
        chosen, rejected = (exact(torch.tensor([row[f"{side}_input_ids"]])).logits[0, 0] for side in ("chosen", "rejected"))
        total = total + torch.log1p(torch.exp(-(chosen - rejected - (margin or 0.0)))) + 0.1 * (chosen + rejected) ** 2
    (total / 6).backward()
    for name, value in exact.named_parameters():
        assert torch.allclose(value.grad.float(), gradients[4][name], atol=2e-6), name


def test_held_out_measures_are_those_of_the_pairs_whatever_the_batches(build, base):
    rows = pairs_of([5, 40, 9, 33, 12, 3, 60, 21, 8, 17, 4])
    # As two ranks of batch 4 would need it: of four batches the last is filling alone.
    trainer = build(rows, pad_for_ranks(rows, 16))
    found = trainer.evaluate()
    chosen, rejected = plain_scores(base, rows)
    difference = chosen - rejected
    assert found["eval_loss"] == pytest.approx(log1pexp(-difference).mean(), rel=1e-5) == pytest.approx(found["eval_log_loss"])
    assert found["eval_accuracy"] == (difference > 0).mean()
    assert found["eval_margin"] == pytest.approx(difference.mean(), rel=1e-4)
    assert found["eval_rejected_reward"] == pytest.approx(rejected.mean(), rel=1e-4)
    assert found["eval_rejected_reward_std"] == pytest.approx(rejected.std(), rel=1e-4)
    confidence = 1 / (1 + numpy.exp(-abs(difference)))
    place = numpy.minimum((confidence - 0.5) * 20, 9).astype(int)
    error = sum(abs(((difference > 0) - confidence)[place == bin].sum()) for bin in range(10)) / 11
    assert found["eval_calibration_error"] == pytest.approx(error, rel=1e-4)


def test_a_reward_model_learns_which_answers_are_better(build, base):
    """Better is: ends with token 10."""
    rows = pairs_of([12] * 32).to_list()
    for row in rows:
        row["chosen_input_ids"][-1], row["rejected_input_ids"][-1] = 10, 11
    rows = Dataset.from_list(rows, features=FEATURES)
    trainer = build(rows, rows.select(range(8)), "train.max_steps=12", "train.eval_steps=12", "train.learning_rate=3e-3")
    trainer.train()
    assert logged(trainer, "eval_accuracy") == [1.0] and logged(trainer, "eval_log_loss")[0] < 0.3
    assert logged(trainer, "num_tokens")[-1] == sum(2 * 4 * 12 for _ in range(12)) + sum(
        len(row["rejected_input_ids"]) - 12
        for row in (rows[i] for step in range(12) for i in trainer.lives.order.of_step(*divmod(step, 8)))
    )


# ---- the place that a score is read at


def tokenizer_of(*special: str, **named: str) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: place for place, word in enumerate(["a", *special])}, unk_token="a"))
    words.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=words, **named)


@pytest.mark.parametrize(
    ("special", "named", "expected"),
    [
        (("</s>", "[x]"), {"pad_token": "[x]"}, "[x]"),
        (("</s>", "<s>", "<unk>", "<|right_pad|>"), {"pad_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}, "<|right_pad|>"),
        (("</s>", "<s>", "<unk>"), {"pad_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}, "<unk>"),
        (("</s>", "[x]", "<s>"), {"pad_token": "</s>", "bos_token": "<s>"}, "<s>"),
        (("</s>", "[x]"), {"pad_token": "</s>"}, "[x]"),
    ],
)
def test_a_pad_token_that_ends_answers_is_replaced_by_one_that_does_not(special, named, expected):
    tokenizer = tokenizer_of(*special, eos_token="</s>", **named)
    said = settle_pad(tokenizer, {tokenizer.eos_token_id})
    assert tokenizer.pad_token == expected and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert said is None if named["pad_token"] == expected else f"pads with '{expected}': answers end with '</s>'" in said


def test_without_a_free_special_token_it_is_refused():
    tokenizer = tokenizer_of("</s>", "[x]", eos_token="</s>", pad_token="</s>")
    with pytest.raises(ModelError, match="none of its special tokens is free"):
        settle_pad(tokenizer, set(tokenizer.convert_tokens_to_ids(["</s>", "[x]"])))


def test_endings_are_the_last_ids_of_all_answers():
    rows = pairs_of([5, 7, 9])
    expected = {row[f"{side}_input_ids"][-1] for row in rows for side in ("chosen", "rejected")}
    assert reward.endings(rows) == expected
    assert {row["chosen_input_ids"][-1] for row in rows.select([0, 2])} <= reward.endings(rows.select([0, 2]))
    assert reward.endings(Dataset(rows.data.slice(1, 1))) == {rows[1][f"{side}_input_ids"][-1] for side in ("chosen", "rejected")}


def test_a_row_has_the_same_score_in_any_batch_and_none_is_read_at_its_padding(base):
    rows = [row["chosen_input_ids"] for row in pairs_of([5, 40, 9, 33, 12, 3, 60])]
    tokenizer = AutoTokenizer.from_pretrained(resolve(TINY))
    base.config.pad_token_id = tokenizer.pad_token_id
    judge = RewardModel(base.eval(), tokenizer, None)
    by_hand, _ = plain_scores(base, pairs_of([5, 40, 9, 33, 12, 3, 60]))
    for size in (1, 3, 16):
        assert judge.score(rows, batch_size=size) == pytest.approx(by_hand.tolist(), rel=1e-4, abs=1e-5)
    with pytest.raises(ModelError, match="row 1 has no token"):
        judge.score([[5], []])
    assert judge.score([]) == []


def test_a_pad_token_that_ends_a_row_would_hide_its_end_from_transformers(base):
    """Why settle_pad is there."""
    ids = [50, 60, 70, 80]
    scores = {}
    for pad in (80, 81):
        base.config.pad_token_id = pad
        scores[pad] = RewardModel(base.eval(), None, None).score([ids])[0]
    before_the_end = plain_scores(base, Dataset.from_list([{"chosen_input_ids": ids[:-1], "rejected_input_ids": ids}]))
    assert [scores[80], scores[81]] == pytest.approx([before_the_end[0][0], before_the_end[1][0]], rel=1e-4)


# ---- a whole run, and what it exports


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs(name) -> the folder of a run of ten steps over pairs, whose tokenizer pads with the token that ends its answers; made once."""
    folder = tmp_path_factory.mktemp("reward")
    shutil.copytree(resolve(TINY), folder / "base")
    described = folder / "base" / "tokenizer_config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"pad_token": "<|end|>"}))
    (folder / "base" / "chat_template.jinja").write_text(ENDS)
    (folder / "recipe.yaml").write_text(WHOLE_RECIPE.format(base=folder / "base"))
    variants = {
        "adapter": [],
        "whole": ["model.lora=null"],
        "4-bit": ["model.quantization.load_in_4bit=true"],
        "over another": [f"model.adapter={folder / 'adapter'}", "model.adapter_mode=merge"],
    }

    @functools.cache
    def run(name: str) -> Path:
        life = shared_rig().run(folder / "recipe.yaml", f"output_dir={folder / name}", *variants[name], world=1, backend="single")
        assert life.codes == {0: 0}, life.output(0)
        assert "pads with '<|pad|>': answers end with '<|end|>'" in life.output(0)
        return folder / name

    return run


ENDS = """
{%- for tool in tools or [] %}<|system|>{{ tool.function.name }}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{% generation %}<|assistant|>{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|end|>{% endgeneration %}
{%- else %}<|user|>{{ message.content }}{% endif %}{% endfor %}
"""
"""Ends every answer with the token of the end."""
WHOLE_RECIPE = """
task: reward
model: {{name_or_path: "{base}", lora: {{r: 4}}}}
data: {{train: [{{path: "embedded:pairs-train", max_rows: 24}}], eval: [{{path: "embedded:pairs-eval", max_rows: 9}}], max_length: 256}}
train: {{max_steps: 6, per_device_train_batch_size: 4, learning_rate: 2.0e-2, logging_steps: 3, eval_steps: 6}}
tracking: {{mode: disabled}}
"""


def last_evaluation(run) -> dict[str, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/accuracy" in line][-1]


def held_out(run) -> Dataset:
    marker = next(run.glob("logs/attempt-1/prepared-*.json"))
    return load_prepared(json.loads(marker.read_text())["folder"]).eval


def agrees_with_log(chosen, rejected, run) -> bool:
    difference, logged = numpy.array(chosen) - numpy.array(rejected), last_evaluation(run)
    assert numpy.mean(chosen) == pytest.approx(logged["eval/chosen_reward"], abs=1e-4)
    assert log1pexp(-difference).mean() == pytest.approx(logged["eval/log_loss"], abs=1e-4)
    return (difference > 0).mean() == pytest.approx(logged["eval/accuracy"])


@pytest.mark.parametrize("name", ["adapter", "whole", "4-bit", "over another"])
def test_a_run_is_loaded_as_a_judge_with_the_scores_that_it_logged(runs, name):
    judge, rows = load_reward_model(runs(name)), held_out(runs(name))
    assert not any(parameter.requires_grad for parameter in judge.model.parameters())
    assert agrees_with_log(judge.score(rows["chosen_input_ids"]), judge.score(rows["rejected_input_ids"]), runs(name))
    assert judge.digest and judge.tokenizer.pad_token == "<|pad|>"


@pytest.mark.parametrize("name", ["adapter", "whole"])
def test_plain_transformers_and_peft_load_an_export_with_the_scores_that_were_logged(runs, name):
    final, rows = runs(name) / "final", held_out(runs(name))
    tokenizer = AutoTokenizer.from_pretrained(final)
    if name == "whole":
        model = AutoModelForSequenceClassification.from_pretrained(final)
        assert model.config.num_labels == 1 and model.config.pad_token_id == tokenizer.pad_token_id
    else:
        model = AutoPeftModelForSequenceClassification.from_pretrained(final, num_labels=1, dtype=torch.float32)
        model.config.pad_token_id = tokenizer.pad_token_id
        saved = load_file(final / "adapter_model.safetensors")
        assert [key for key in saved if "lora_" not in key] == ["base_model.model.score.weight"]
    batches = [tokenizer.pad({"input_ids": rows[f"{side}_input_ids"]}, return_tensors="pt") for side in ("chosen", "rejected")]
    with torch.no_grad():
        scores = [model.eval()(**batch).logits[:, 0].numpy() for batch in batches]
    assert agrees_with_log(*scores, runs(name))


def test_an_adapter_merges_into_its_base_and_the_merged_model_judges_alike(runs):
    from click.testing import CliRunner

    from harness.cli.export import command

    done = CliRunner().invoke(command, [str(runs("adapter")), "--merge"])
    assert done.exit_code == 0, done.output
    assert "its scores over 8 pairs" in done.output and "nats per pair" in done.output
    rows = held_out(runs("adapter"))
    merged, adapted = load_reward_model(runs("adapter") / "merged"), load_reward_model(runs("adapter"))
    scores = [judge.score(rows["chosen_input_ids"]) for judge in (merged, adapted)]
    assert scores[0] == pytest.approx(scores[1], abs=0.1)
    assert merged.tokenizer.pad_token == "<|pad|>" and merged.model.config.num_labels == 1


def test_what_is_no_reward_model_or_not_what_was_exported_is_refused(runs, tmp_path):
    with pytest.raises(ModelError, match="is no classifier of one score"):
        load_reward_model(resolve(TINY))
    # A language model whose config speaks of one label: its score would be drawn anew in every process.
    drawn = tmp_path / "drawn"
    shutil.copytree(resolve(TINY), drawn)
    config = json.loads((drawn / "config.json").read_text())
    (drawn / "config.json").write_text(json.dumps(config | {"id2label": {"0": "score"}, "label2id": {"score": 0}}))
    with pytest.raises(ModelError, match="is no classifier of one score .lacks score.weight"):
        load_reward_model(drawn)
    changed = tmp_path / "final"
    shutil.copytree(runs("whole") / "final", changed)
    with open(changed / "config.json", "a") as stream:
        stream.write("\n")
    with pytest.raises(ModelError, match="is not what was exported"):
        load_reward_model(changed)
    other = tmp_path / "other"
    shutil.copytree(runs("adapter") / "final", other)
    (other / "harness.json").unlink()
    with pytest.raises(ModelError, match="is an adapter without harness's manifest"):
        load_reward_model(other)
    manifest = json.loads((runs("adapter") / "final" / "harness.json").read_text())
    (other / "harness.json").write_text(json.dumps(manifest | {"task": "sft"}))
    with pytest.raises(ModelError, match="was trained by task = sft"):
        load_reward_model(other)
