"""Reinforcement learning through real trainers, on one process: what is asked, written, paid and learnt, and that RLOO is what its paper
says."""

import itertools
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import small_vllm
import torch
from accelerate.data_loader import BatchSamplerShard
from conftest import REPOSITORY
from torch.utils.data import BatchSampler
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOTrainer

from harness.checkpoint.cadence import Cadence
from harness.checkpoint.door import Door, Signals
from harness.data import prepare_recipe
from harness.data.templates import Renderer
from harness.embedded import resolve
from harness.errors import DataError, ModelError, RecipeError
from harness.guard import Guard
from harness.launcher import check_named, check_world
from harness.model import attach_adapter, follow_tokenizer, load_tokenizer
from harness.model.adapters import add_reference_adapter
from harness.quickstart.tools import BASE_TOOLS, TOOLS
from harness.recipe import load
from harness.recipe.backend import load_backend
from harness.recipe.schema import Checkpoint
from harness.run import RankReport
from harness.tasks import rlhf
from harness.tasks.arguments import training_arguments
from harness.tasks.lives import Lives
from harness.tasks.reinforced import PromptOrder, Reinforced, Repeated
from harness.tasks.reward_models import load_reward_model
from harness.tasks.rewards import build_rewards
from harness.tasks.smoke import smoke_test
from harness.tasks.trainer import pad_for_ranks
from harness.tracking.throughput import Throughput

RECIPE = """
task: rlhf
model: {name_or_path: "embedded:tiny-llama"}
data: {train: rows.jsonl, max_length: 128}
rlhf: {rewards: [{type: tool_calls}], num_generations: 4, max_completion_length: 12}
train: {per_device_train_batch_size: 8, max_steps: 1, logging_steps: 1, learning_rate: 1.0e-3}
"""


def first_rows(name: str, count: int) -> str:
    with open(resolve(name), encoding="utf-8") as source:
        return "".join(itertools.islice(source, count))


def restless() -> torch.nn.Module:
    """A policy that ends its turn at one token in sixteen, so that its answers have all lengths."""
    model = AutoModelForCausalLM.from_pretrained(resolve("embedded:tiny-llama"), dtype=torch.float32)
    model.generation_config.eos_token_id = [1, *range(16, model.config.vocab_size, 16)]
    return model


@pytest.fixture
def build(tmp_path, monkeypatch):
    """build(*overrides, model=None, rows=…, held_out=…, **options of rlhf.build_trainer) -> trainer, in a directory of its own."""
    monkeypatch.chdir(tmp_path)

    def build(*overrides, model=None, rows=("embedded:base-train", 4), held_out=None, by_vllm=False, begin=None, **options):
        # A module of the test before.
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        Path("recipe.yaml").write_text(RECIPE)
        Path("rows.jsonl").write_text(first_rows(*rows))
        if held_out:
            Path("held-out.jsonl").write_text(first_rows(*held_out))
            overrides = ("data.eval=held-out.jsonl", "train.eval_steps=1", "train.per_device_eval_batch_size=4", *overrides)
        recipe = load("recipe.yaml", overrides)
        tokenizer = load_tokenizer(recipe)
        prepared = prepare_recipe(recipe, tokenizer, packing=False, say=lambda text: None)
        train_rows, eval_rows, counted = prepared.train, prepared.eval, len(prepared.eval or ())
        if eval_rows is not None:
            eval_rows = pad_for_ranks(eval_rows, 4)
        arguments = training_arguments(recipe, load_backend("single"), tmp_path / "run", 1, has_gpu=False, bf16_hardware=False)
        args = rlhf.build_arguments(recipe, arguments, flattens=False, writes_by_vllm=by_vllm)
        model = model or restless()
        follow_tokenizer(model, tokenizer)
        if recipe.model.lora:
            model = attach_adapter(model, recipe, load_backend("single"), "float32")
        if begin:
            begin(model)
        rewards = build_rewards(recipe, partial(load_reward_model, tokenizer=tokenizer))
        trainer = rlhf.build_trainer(
            args, model, tokenizer, train_rows, eval_rows, [], recipe=recipe, rewards=rewards, counted=counted, **options
        )
        trainer.configure(throughput=Throughput())
        order = rlhf.build_order(recipe.rlhf.num_generations, len(train_rows), 8 * args.gradient_accumulation_steps, args.seed)
        lives = {"committer": None, "cadence": Cadence(Checkpoint(auto=False), 1, now=0), "door": Door(Signals(), None)}
        lives |= {"guard": Guard(recipe.guard, fp16=False), "order": order, "report": RankReport(0), "facts": {}, "tracking": None}
        trainer.live(Lives(**lives))
        return trainer

    return build


@pytest.fixture
def seen(monkeypatch):
    """What the loss is computed of, micro-batch by micro-batch, in training."""
    kept, compute = [], Reinforced._compute_loss

    def computing(self, model, inputs):
        if self.model.training:
            kept.append({key: value.clone() for key, value in inputs.items() if isinstance(value, torch.Tensor)})
        return compute(self, model, inputs)

    monkeypatch.setattr(Reinforced, "_compute_loss", computing)
    return kept


def logged(trainer, key: str) -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


def unpadded(batches, part: str) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for batch in batches for ids, mask in zip(batch[f"{part}_ids"], batch[f"{part}_mask"], strict=True)]


# ---- what is asked


def test_prompts_are_those_that_a_server_would_ask_each_as_often_as_it_is_answered(build, seen):
    trainer = build("train.gradient_accumulation_steps=2", "train.max_steps=2")
    trainer.train()
    renderer = Renderer(load_tokenizer(load("recipe.yaml")))
    asked = []
    for line in Path("rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        asked.append(renderer.render_prompt({**row, "messages": row["messages"][:-1]}))
    for step in (seen[:2], seen[2:]):
        assert sorted(unpadded(step, "prompt")) == sorted(4 * asked)
    # Both epochs have the prompts, and in each step all answers are new.
    answers = [tuple(answer) for answer in unpadded(seen, "completion")]
    assert len(answers) == 32 and len(set(answers)) > 25


def test_an_epoch_takes_whole_groups_on_any_number_of_ranks_and_leaves_other_prompts_out_each_time():
    order = PromptOrder(prompts=11, per_step=4, seed=1)
    steps = [[order.of_step(epoch, step) for step in range(2)] for epoch in range(9)]
    for epoch in steps:
        assert len({index for step in epoch for index in step}) == 8
    assert len(order) == 8 and order.missing == 0
    assert {index for epoch in steps for step in epoch for index in step} == set(range(11))
    # 12 answers to each of 4 prompts: two ranks make one micro-batch of 24, three ranks two of 8.
    for ranks, micro_batch, accumulation in ((1, 24, 2), (2, 24, 1), (3, 8, 2)):
        sampler = Repeated(order, answers=12, micro_batches=accumulation)
        whole = BatchSampler(sampler, micro_batch * accumulation, drop_last=False)
        batches = [list(BatchSamplerShard(whole, ranks, rank)) for rank in range(ranks)]
        order.epoch = 0
        for step in range(2):
            of_step = [index for rank in batches for index in rank[step * accumulation]]
            assert of_step == [index for index in steps[0][step] for _ in range(12)]
            # TRL's loader yields the same again for every micro-batch.
            assert all(rank[step * accumulation] == rank[step * accumulation + accumulation - 1] for rank in batches)


def test_too_few_prompts_and_groups_that_ranks_would_cut_are_refused_with_their_arithmetic(build):
    with pytest.raises(DataError, match="3 prompts, and each step takes 4"):
        build("train.gradient_accumulation_steps=2", rows=("embedded:base-train", 3))
    recipe = load("recipe.yaml", ["rlhf.num_generations=6"])
    with pytest.raises(Exception, match=r"a step takes 16 answers \(2 ranks x per_device_train_batch_size = 8 x 1\)"):
        check_world(recipe, load_backend("ddp"), 2)
    check_world(recipe, load_backend("ddp"), 3)


def test_a_prompt_that_leaves_no_room_for_an_answer_is_dropped_and_counted(build):
    build(rows=("embedded:base-train", 20))
    tokenizer, counts = load_tokenizer(load("recipe.yaml")), {}
    lengths = None
    for room in (128, 90):
        recipe = load("recipe.yaml", [f"data.max_length={room}"])
        prepared = prepare_recipe(recipe, tokenizer, packing=False, say=lambda text: None)
        counts[room], lengths = prepared.report.train, lengths or prepared.train["length"]
    fit = sum(length <= 78 for length in lengths)
    assert 0 < fit < 20 and counts[90].rows == fit and counts[90].dropped["longer than max_length"].rows == 20 - fit
    assert "leaves 78 beside rlhf.max_completion_length = 12" in counts[90].dropped["longer than max_length"].locations[0]
    with pytest.raises(DataError, match="set data.too_long: drop_row"):
        prepare_recipe(load("recipe.yaml", ["data.max_length=90", "data.too_long=fail"]), tokenizer, packing=False)


# ---- what is written


def test_answers_end_with_the_token_that_ends_them_and_leave_model_and_random_numbers_as_they_were(build, seen):
    trainer = build("rlhf.temperature=0.7", "rlhf.top_k=50")
    before, config = torch.get_rng_state(), trainer.model.generation_config
    (batch,) = itertools.islice(trainer.get_train_dataloader(), 1)
    trainer.model.train()
    inputs = trainer._prepare_inputs(batch)
    assert torch.equal(before, torch.get_rng_state()) and trainer.model.training and trainer.model.generation_config is config
    answers = unpadded([inputs], "completion")
    ends = set(config.eos_token_id)
    assert all(not ends & set(answer[:-1]) and (answer[-1] in ends or len(answer) == 12) for answer in answers)
    assert len({len(answer) for answer in answers}) > 2


def test_the_gap_between_generator_and_trainer_is_measured(build, monkeypatch):
    """Where there is none it is rounding; a generator that were another is seen, token by token."""
    write, gaps = Reinforced._write_plainly, {}
    for wrong in (0.0, 0.25):

        def writing(self, prompts, wrong=wrong):
            answers, heard = write(self, prompts)
            return answers, [[value + wrong * (at % 2) for at, value in enumerate(each)] for each in heard]

        monkeypatch.setattr(Reinforced, "_write_plainly", writing)
        for algorithm in ("rloo", "grpo"):
            trainer = build(f"rlhf.algorithm={algorithm}", "rlhf.temperature=0.6", "rlhf.top_p=0.9", "rlhf.top_k=40")
            trainer.train()
            kept = [logged(trainer, f"sampling/sampling_logp_difference/{kind}")[0] for kind in ("mean", "max")]
            gaps[wrong, algorithm] = kept
    for algorithm in ("rloo", "grpo"):
        assert gaps[0.0, algorithm][0] <= gaps[0.0, algorithm][1] < 1e-4
        assert 0.05 < gaps[0.25, algorithm][0] < 0.13 and gaps[0.25, algorithm][1] == pytest.approx(0.25, abs=1e-4)


def test_to_see_whether_it_fits_the_longest_prompts_get_answers_as_long_as_they_may_be(build, seen):
    trainer = build(rows=("embedded:base-train", 20), fills=True)
    trainer.train()
    assert {len(answer) for answer in unpadded(seen, "completion")} == {12}
    recipe = load("recipe.yaml", ["train.gradient_accumulation_steps=2"])
    rows = prepare_recipe(recipe, load_tokenizer(recipe), packing=False, say=lambda text: None).train
    _, longest, _ = smoke_test(recipe, rows, world_size=2)
    # Two steps of 32 answers to 8 prompts each.
    assert sorted(longest["length"]) == sorted(rows["length"])[-16:]


def test_what_vllm_is_asked_and_tells_is_what_the_policy_would_write_itself(build, seen, tmp_path, monkeypatch):
    """The most probable token each time, so that there is one answer to a prompt."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        # VLLMGeneration sets them.
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    small_vllm.install(monkeypatch)
    from trl.generation.vllm_generation import VLLMGeneration

    settings = ("rlhf.top_k=1", "rlhf.beta=0", "train.max_steps=2", "rlhf.rewards=[{type: length, target_tokens: 3}]")
    written = []
    for algorithm, by_vllm in (("rloo", False), ("rloo", True), ("grpo", True)):
        monkeypatch.setattr(f"trl.trainer.{algorithm}_trainer.VLLMGeneration", VLLMGeneration, raising=False)
        seen.clear()
        model = restless()
        model.save_pretrained(tmp_path / "policy")
        model.config._name_or_path = model.name_or_path = str(tmp_path / "policy")
        trainer = build(*settings, f"rlhf.algorithm={algorithm}", model=model, by_vllm=by_vllm)
        trainer.train()
        written.append(sorted(unpadded(seen, "completion")))
        assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-4
    assert len(written[0]) == 16 and len(set(map(tuple, written[0]))) > 2 and written[0] == written[1] == written[2]
    # Once a step, and before the first.
    assert trainer.vllm_generation.llm.handed == 2 * [name for name, _ in model.named_parameters()]


def test_vllm_is_used_where_it_is_there_and_all_weights_are_trained(build, tmp_path, monkeypatch):
    build()

    def asking(*overrides):
        return load("recipe.yaml", overrides)

    assert not rlhf.uses_vllm(asking(), has_gpu=True)
    with pytest.raises(ModelError, match=r"pip install 'trl\[vllm\]' on a machine with a GPU"):
        rlhf.uses_vllm(asking("rlhf.use_vllm=true"), has_gpu=True)
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert rlhf.uses_vllm(asking(), has_gpu=True) and rlhf.uses_vllm(asking("rlhf.use_vllm=true"), has_gpu=True)
    assert not rlhf.uses_vllm(asking(), has_gpu=False) and not rlhf.uses_vllm(asking("model.lora.r=8"), has_gpu=True)


# ---- what is learnt


def by_hand(policy, reference, batch, paid, *, beta: float) -> tuple[torch.Tensor, list[float]]:
    """(gradient, advantages) of RLOO in float64, from plain logits: Ahmadian et al. 2024. paid: of the answers in their order, by group."""
    ids, mask = (torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    width = batch["completion_ids"].shape[1]
    sums = []
    for model in (policy, reference):
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1]
        of_tokens = logits.log_softmax(-1).gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)
        sums.append((of_tokens * batch["completion_mask"]).sum(1))
    rewards = torch.tensor(paid, dtype=torch.float64) - beta * (sums[0] - sums[1]).detach()
    advantages = []
    for start in range(0, len(rewards), 4):
        group = rewards[start : start + 4].tolist()
        advantages += [value - sum(group[:at] + group[at + 1 :]) / 3 for at, value in enumerate(group)]
    loss = -(torch.tensor(advantages, dtype=torch.float64) * sums[0]).mean()
    gradients = torch.autograd.grad(loss, list(policy.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients]), advantages


def test_rloo_is_leave_one_out_with_the_divergence_in_the_reward(build, seen, monkeypatch):
    """The policy has moved away from its reference, which TRL loads from where the policy came from."""
    policy = restless()
    torch.manual_seed(3)
    with torch.no_grad():
        for weights in policy.parameters():
            weights += 0.1 * weights.std() * torch.randn_like(weights)
    kept, calculate = [], Reinforced._calculate_rewards

    def calculating(self, *arguments):
        kept.append((calculate(self, *arguments), [answer.ids for answer in self._answers]))
        return kept[-1][0]

    monkeypatch.setattr(Reinforced, "_calculate_rewards", calculating)
    settings = ("rlhf.beta=0.3", "train.max_grad_norm=1e9", "rlhf.rewards=[{type: length, target_tokens: 3, weight: 2}]")
    trainer = build(*settings, model=policy)
    start = {name: weights.detach().double().clone() for name, weights in policy.named_parameters()}
    trainer.train()
    (batch,), ((paid, answers),) = seen, kept
    # The buffer shuffles the answers: put what they are paid into its order, and both into groups.
    now = unpadded([batch], "completion")
    order = [now.index(answer) for answer in answers]
    assert sorted(order) == list(range(8)), "two answers are equal; choose another seed"
    grouped = {key: batch[key][order] for key in batch if batch[key].ndim == 2}
    double, reference = restless().double(), restless().double()
    double.load_state_dict(start, strict=False)
    gradient, advantages = by_hand(double, reference, grouped, (2 * paid[:, 0]).tolist(), beta=0.3)
    assert batch["advantages"][order].tolist() == pytest.approx(advantages, rel=1e-4, abs=1e-5)
    assert logged(trainer, "grad_norm")[0] == pytest.approx(gradient.norm().item(), rel=1e-4)
    assert abs(sum(advantages)) < 1e-9 and max(advantages) > 0.1
    assert logged(trainer, "reward")[0] == pytest.approx(2 * paid.mean().item(), rel=1e-5)


def test_answers_that_are_all_paid_alike_teach_nothing_and_are_counted(build):
    Path("mine.py").write_text("def same(completions, **rest):\n    return [1.0] * len(completions)\n")
    trainer = build("rlhf.rewards=[{type: function, function: 'mine:same'}]", "rlhf.beta=0")
    trainer.train()
    assert logged(trainer, "frac_reward_zero_std") == [1.0] and logged(trainer, "reward") == [1.0]
    assert logged(trainer, "grad_norm")[0] < 1e-9
    trainer = build("rlhf.rewards=[{type: length, target_tokens: 1}]", "rlhf.beta=0.5")
    trainer.train()
    assert logged(trainer, "frac_reward_zero_std")[0] < 1 and logged(trainer, "grad_norm")[0] > 0


def test_the_reference_of_an_adapter_is_the_base_without_it_and_there_is_no_copy(build, seen):
    trainer = build("model.lora.r=8", "rlhf.beta=0.5", "train.max_steps=3", "train.learning_rate=0.05")
    trainer.train()
    assert list(trainer.model.peft_config) == ["default"] and trainer.ref_model is None
    kl = logged(trainer, "kl")
    assert kl[0] == 0 and all(abs(value) > 1e-5 for value in kl[1:])
    assert {name.split(".")[-2] for name, weights in trainer.model.named_parameters() if "lora_" in name} == {"default"}


def test_a_policy_that_continues_an_adapter_is_held_to_that_adapter(build):
    def begin(model):
        torch.manual_seed(5)
        with torch.no_grad():
            for name, weights in model.named_parameters():
                if "lora_B" in name:
                    weights.normal_(0, 0.1)
        add_reference_adapter(model)

    paid = "rlhf.rewards=[{type: length, target_tokens: 3}]"
    trainer = build("model.lora.r=8", "rlhf.beta=0.5", "train.max_steps=2", "train.learning_rate=0.05", paid, begin=begin)
    trainer.train()
    assert sorted(trainer.model.peft_config) == ["default", "reference"]
    # Against the base it would be far away from the first step on.
    kl = logged(trainer, "kl")
    assert kl[0] == 0 and abs(kl[1]) > 1e-5
    assert {name.split(".")[-2] for name, weights in trainer.model.named_parameters() if weights.requires_grad} == {"default"}


def test_a_held_out_row_that_only_fills_a_batch_is_in_no_mean(build):
    Path("mine.py").write_text("def length(completion_ids, answer, **rest):\n    return [float(len(a or '')) for a in answer]\n")
    own = "rlhf.rewards=[{type: function, function: 'mine:length'}, {type: tool_calls, weight: 0.001}]"
    trainer = build(own, "train.eval_on_start=true", held_out=("embedded:base-eval", 15))
    trainer.train()
    answers = [json.loads(line)["messages"][-1].get("content", "") for line in Path("held-out.jsonl").read_text().splitlines()]
    assert any(answers)
    first = trainer.state.log_history[0]
    assert first["eval_rewards/length/mean"] == pytest.approx(sum(map(len, answers)) / 15)
    assert first["eval_reward"] == pytest.approx(first["eval_rewards/length/mean"] + 0.001 * first["eval_rewards/tool_calls/mean"])
    assert not any("loss" in key or "zero_std" in key or "clip_ratio" in key for key in first)
    assert 0 < first["eval_completions/mean_length"] <= 12 and first["eval_kl"] == 0


# ---- reward models


@pytest.fixture
def judge(tmp_path):
    """judge(labels=1) -> the folder of a classifier of the tiny model's tokens."""

    def judge(labels=1):
        folder = tmp_path / f"judge-{labels}"
        torch.manual_seed(1)
        source = resolve("embedded:tiny-llama")
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=labels, dtype=torch.float32)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        return folder

    return judge


def test_a_reward_model_scores_the_last_token_of_prompt_and_answer(build, judge, seen):
    folder = judge()
    trainer = build(f"rlhf.rewards=[{{type: reward_model, model: {folder}}}]", "rlhf.beta=0")
    trainer.train()
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = [prompt + answer for prompt, answer in zip(unpadded(seen, "prompt"), unpadded(seen, "completion"), strict=True)]
    with torch.no_grad():
        # One at a time and without padding, by transformers' own head.
        scores = [model(input_ids=torch.tensor([row])).logits[0, 0].item() for row in rows]
    assert logged(trainer, "reward")[0] == pytest.approx(sum(scores) / 8, rel=1e-4)
    assert max(scores) - min(scores) > 0.01


@pytest.mark.parametrize("template", ["plain-tools", "own"])
def test_an_answer_is_judged_at_the_token_at_which_the_rows_of_the_training_end(judge, template):
    """plain-tools has a line break after each turn, as Qwen's template has, and the policy does not write it."""
    folder = judge()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if template == "plain-tools":
        tokenizer.chat_template = (REPOSITORY / "configs/templates/plain-tools.jinja").read_text()
        tokenizer.save_pretrained(folder)
    renderer, row = Renderer(tokenizer), {"messages": [{"role": "user", "content": "hi"}]}
    said = [*row["messages"], {"role": "assistant", "content": "warm"}]
    asked, trained = renderer.render_prompt(row), renderer.render({"messages": said}).ids
    written = trained[: trained.index(tokenizer.eos_token_id, len(asked)) + 1]
    assert (written != trained) == (template == "plain-tools")
    loaded = load_reward_model(str(folder), tokenizer)
    cut_off = written[:-1]
    assert loaded.score([written, cut_off]) == pytest.approx(loaded.model.score([trained, cut_off]), rel=1e-5)


def test_what_is_no_reward_model_is_refused(build, judge, tmp_path):
    def refused(folder) -> str:
        with pytest.raises(ModelError) as error:
            build(f"rlhf.rewards=[{{type: reward_model, model: {folder}}}]")
        return str(error.value)

    assert "no classifier of one score" in refused(judge(labels=2))
    refused(resolve("embedded:tiny-llama"))
    foreign = judge()
    tokens = json.loads((foreign / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["Paris"], vocabulary["London"] = vocabulary["London"], vocabulary["Paris"]
    (foreign / "tokenizer.json").write_text(json.dumps(tokens))
    assert "reads other tokens than the policy writes" in refused(foreign)


# ---- calls that a special token marks


def test_a_call_is_paid_where_only_a_special_token_tells_that_it_begins(build, monkeypatch):
    """As [TOOL_CALLS] of Mistral and <|python_tag|> of Llama 3; where it is left out, these are words with something in braces behind."""
    Path("mine.py").write_text("GIVEN = []\ndef pay(completions, **rest):\n    GIVEN.extend(completions)\n    return [0.0] * 8\n")
    paid = "rlhf.rewards=[{type: tool_calls}, {type: function, function: 'mine:pay'}]"
    trainer = build(paid, "rlhf.max_completion_length=64", "data.max_length=400", "rlhf.beta=0")
    tokenizer = trainer.processing_class
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    trainer.model.resize_token_embeddings(len(tokenizer))
    gold = {}
    for line in Path("rows.jsonl").read_text().splitlines():
        user, answer = json.loads(line)["messages"]
        calls = [call["function"] for call in answer.get("tool_calls", ())]
        gold[user["content"]] = f"I look. [TOOL_CALLS]{json.dumps(calls[0])}" if calls else answer["content"]
    assert any("[TOOL_CALLS]" in said for said in gold.values())
    script(monkeypatch, lambda text: gold[text.partition("<|user|>")[2].partition("<|end|>")[0]])
    trainer.train()
    assert logged(trainer, "rewards/tool_calls/mean") == [1.0]
    # And a function of one's own is given what was written, without the token that ends it.
    given = {said["content"] for (said,) in sys.modules["mine"].GIVEN}
    assert given <= {*gold.values()} and any("[TOOL_CALLS]" in said for said in given)


def test_what_such_a_token_marks_is_executed_as_it_is_paid():
    tokenizer = AutoTokenizer.from_pretrained(resolve("embedded:tiny-llama"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    reader = rlhf.Reader(tokenizer, [tokenizer.eos_token_id])
    call = {"name": "get_weather", "arguments": {"city": "Paris"}}
    ids = tokenizer(f"i look. [TOOL_CALLS]{json.dumps(call)}<|end|>")["input_ids"]
    assert reader.parse_response(ids)["tool_calls"] == [{"type": "function", "function": call}]
    assert reader.parse_response(tokenizer("it is 0<|end|>")["input_ids"])["content"] == "it is 0"


# ---- tools that run

ACTS = ("rlhf.algorithm=grpo", "rlhf.max_completion_length=64", "rlhf.tools=harness.quickstart.tools:TOOLS")
PAID = "rlhf.rewards=[{type: function, function: 'harness.quickstart.tools:says_the_result'}, {type: tool_calls}]"


def script(monkeypatch, turns) -> None:
    """Let the policy say this. turns(prompt text) -> what it says after it."""

    def writing(self, prompts):
        texts = [self.processing_class.decode(prompt) for prompt in prompts]
        answers = [self.processing_class(turns(text) + "<|end|>")["input_ids"] for text in texts]
        return answers, [[-1.0] * len(answer) for answer in answers]

    monkeypatch.setattr(Reinforced, "_write_plainly", writing)


def asks_and_tells(gold: dict[str, list[str]], wrong: tuple[str, ...] = ()):
    """What the rows' own assistant says, turn by turn; of questions in `wrong` another answer at the end."""

    def turns(text: str) -> str:
        question = text.partition("<|user|>")[2].partition("<|end|>")[0]
        call, words = gold[question]
        return call if text.endswith("<|end|><|assistant|>") and "<|tool|>" not in text else ("it is 0" if question in wrong else words)

    return turns


def gold_turns() -> dict[str, list[str]]:
    found = {}
    for line in Path("rows.jsonl").read_text().splitlines():
        user, call, _, words = json.loads(line)["messages"]
        function = call["tool_calls"][0]["function"]
        said = f'<tool_call>{{"name": "{function["name"]}", "arguments": {json.dumps(function["arguments"])}}}</tool_call>'
        found[user["content"]] = [said, words["content"]]
    return found


def test_tools_run_and_what_they_return_is_read_but_not_trained(build, seen, monkeypatch):
    trainer = build(*ACTS, PAID, rows=("embedded:look-up-train", 2))
    gold = gold_turns()
    wrong = tuple(gold)[:1]
    script(monkeypatch, asks_and_tells(gold, wrong))
    trainer.train()
    (batch,) = seen
    results = {json.loads(line)["messages"][2]["content"] for line in Path("rows.jsonl").read_text().splitlines()}
    tokenizer = trainer.processing_class
    for ids, mask, own in zip(batch["completion_ids"], batch["completion_mask"].bool(), batch["tool_mask"].bool(), strict=True):
        # All that came back, with the marks around it, and nothing that the policy said.
        returned = tokenizer.decode(ids[mask & ~own])
        assert returned.removeprefix("<|tool|>").removesuffix("<|end|><|assistant|>") in results
        assert tokenizer.decode(ids[mask & own]).count("<|end|>") == 2
    assert logged(trainer, "tools/call_frequency") == [1.0] and logged(trainer, "tools/failure_frequency") == [0.0]
    assert logged(trainer, "rewards/says_the_result/mean") == [0.5] and logged(trainer, "rewards/tool_calls/mean") == [1.0]
    assert logged(trainer, "tools/exact_match") == [1.0]


def test_the_loss_has_no_gradient_at_tokens_that_a_tool_returned(build, seen, monkeypatch):
    trainer = build(*ACTS, PAID, "rlhf.beta=0.1", rows=("embedded:look-up-train", 2))
    script(monkeypatch, asks_and_tells(gold_turns()))
    trainer.train()
    (batch,) = seen
    batch["advantages"] = torch.linspace(-1, 1, 8)
    leaf = torch.full(batch["completion_ids"].shape, -1.0, requires_grad=True)
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (leaf, torch.zeros_like(leaf), None)
    trainer.model.train()
    GRPOTrainer._compute_loss(trainer, trainer.model, batch).backward()
    counts = (batch["completion_mask"] * batch["tool_mask"]).bool()
    assert (leaf.grad[~counts] == 0).all() and (leaf.grad[counts] != 0).all()
    assert (batch["completion_mask"].bool() & ~counts).any()


def test_a_call_that_fails_is_told_to_the_policy(build, seen, monkeypatch):
    room = ("rlhf.max_completion_length=400", "data.max_length=500")
    trainer = build(*ACTS, *room, PAID, rows=("embedded:look-up-train", 2))
    script(
        monkeypatch, lambda text: "no" if "<|tool|>" in text else '<tool_call>{"name": "get_weather", "arguments": {"town": 1}}</tool_call>'
    )
    trainer.train()
    assert logged(trainer, "tools/failure_frequency") == [1.0]
    assert "unexpected keyword argument" in trainer.processing_class.decode(seen[0]["completion_ids"][0])


def test_an_environment_has_its_own_tools_and_its_own_reward(build, monkeypatch):
    settings = ("rlhf.algorithm=grpo", "rlhf.max_completion_length=64", "rlhf.rewards=[]")
    trainer = build(*settings, "rlhf.environment=harness.quickstart.tools:World", rows=("embedded:look-up-train", 2))
    gold = gold_turns()
    turns = asks_and_tells(gold)
    script(monkeypatch, lambda text: turns(text) if list(gold)[0] in text else "i do not ask")
    trainer.train()
    assert logged(trainer, "rewards/World/mean") == [0.5] and logged(trainer, "tools/call_frequency") == [0.5]


OWN_WORLD = """
from harness.quickstart import tools

class Own(tools.World):
    def reset(self, **row):
        super().reset(**row)
        return " now"

    def get_weather(self, city: str, days: int = 0) -> dict:
        return {"city": city, "sunny": True}

    get_weather.__doc__ = tools.World.get_weather.__doc__

SEEN = []

def watch(prompts, completions, environments, **columns):
    SEEN.extend(zip(prompts, completions, environments))
    return [0.0] * len(prompts)
"""


def test_what_an_environment_returns_is_json_and_a_reward_sees_it_and_what_it_added_to_the_prompt(build, monkeypatch):
    Path("mine.py").write_text(OWN_WORLD)
    rewards = "rlhf.rewards=[{type: function, function: 'mine:watch'}]"
    settings = ("rlhf.algorithm=grpo", "rlhf.max_completion_length=64", "rlhf.environment=mine:Own")
    trainer = build(*settings, rewards, rows=("embedded:look-up-train", 2))
    call = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'
    script(monkeypatch, lambda text: "no" if "<|tool|>" in text else call)
    trainer.train()
    for prompt, said, environment in sys.modules["mine"].SEEN:
        assert type(environment).__name__ == "Own"
        assert prompt[-1]["content"].endswith(" now")
        assert [message["content"] for message in said if message["role"] == "tool"] == ['{"city": "Paris", "sunny": true}']


def test_rows_without_tools_offer_those_that_run_and_rows_with_others_are_refused(build):
    Path("rows.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    Path("recipe.yaml").write_text(RECIPE)
    overrides = [*ACTS, "rlhf.rewards=[{type: length, target_tokens: 9}]", "data.max_length=400"]
    recipe = load("recipe.yaml", overrides)
    rows = prepare_recipe(recipe, load_tokenizer(recipe), packing=False, say=lambda text: None).train
    offered = json.loads(rows[0]["row"])["tools"]
    assert [tool["function"]["name"] for tool in offered] == [tool.__name__ for tool in TOOLS]
    # In the words of the world's own schemas, but for what a docstring adds.
    for tool, own in zip(offered, BASE_TOOLS, strict=True):
        parameters, expected = tool["function"]["parameters"], own.schema()["function"]["parameters"]
        assert tool["function"]["description"] == own.description and parameters["required"] == expected["required"]
        assert {name: each["type"] for name, each in parameters["properties"].items()} == {
            name: each["type"] for name, each in expected["properties"].items()
        }
    Path("rows.jsonl").write_text(first_rows("embedded:adapt-train", 1))
    with pytest.raises(DataError, match="which rlhf.tools does not run"):
        prepare_recipe(recipe, load_tokenizer(recipe), packing=False, say=lambda text: None)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("TOOLS = []", "must be a list of functions"),
        ("TOOLS = 3", "is int; must be a list"),
        ("def f(x):\n    pass\nTOOLS = [f]", "give it types, and a docstring"),
    ],
)
def test_tools_that_are_none_are_refused_when_the_data_is_prepared(build, monkeypatch, code, words):
    build()
    monkeypatch.delitem(sys.modules, "owntools", raising=False)
    Path("owntools.py").write_text(code)
    recipe = load("recipe.yaml", ["rlhf.algorithm=grpo", "rlhf.tools=owntools:TOOLS"])
    check_named(recipe)
    with pytest.raises(RecipeError, match=words):
        prepare_recipe(recipe, load_tokenizer(recipe), packing=False, say=lambda text: None)


def test_names_that_lead_nowhere_cost_no_gpu(build):
    build()
    for override, key in (
        ("rlhf.rewards=[{type: function, function: 'nowhere:f'}]", "rlhf.rewards.0.function"),
        ("rlhf.rewards=[{type: json_schema, json_schema: nowhere.json}]", "rlhf.rewards.0.json_schema"),
    ):
        with pytest.raises(RecipeError, match=key):
            check_named(load("recipe.yaml", [override]))


def test_positions_must_be_enough_for_prompt_and_answer(build):
    with pytest.raises(ModelError, match="positions for"):
        build("rlhf.max_completion_length=450", "data.max_length=600")
    row = {"messages": [{"role": "user", "content": "is it warm " * 100}, {"role": "assistant", "content": "no"}]}
    Path("long.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ModelError, match="positions for"):
        build("rlhf.max_completion_length=300", "data.max_length=2000", held_out=("long.jsonl", 1))
