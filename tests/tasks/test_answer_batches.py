"""Answers in batches: three layouts, one log-probability for each token, against the model's own logits of one answer at a time."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import STORIES, needs_shared
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from harness.tasks.answer_batches import (
    Answer,
    Apart,
    Shared,
    answers_of_pairs,
    model_inputs,
    shared_mask,
    shared_prompt,
    shares_prompts,
    sum_by_answer,
    trained_owners,
)
from harness.tasks.lessons import add_lessons, gold_log_probs

pytestmark = needs_shared
PAD = 0


@pytest.fixture(scope="module")
def model():
    model = AutoModelForCausalLM.from_pretrained(STORIES, attn_implementation="sdpa", dtype=torch.float32).eval()
    add_lessons(model)
    return model


def words(count: int, seed: int) -> list[int]:
    return torch.randint(3, 500, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def answer(prompt: list[int], said: list[int], *, unheard: list[int] = ()) -> Answer:
    """The last words, and before them words that the policy did not say."""
    return Answer(prompt + list(unheard) + said, [-100] * (len(prompt) + len(unheard)) + said)


@pytest.fixture(scope="module")
def pairs() -> list[Answer]:
    """Long and short prompts, one token, none in common, a beginning in common, tool results in the middle, a row that only fills up."""
    prompt = words(40, 1)
    beginning = words(3, 2)
    tool_use = words(4, 3)
    result, other_result = words(6, 4), words(2, 5)
    middle = [
        Answer(prompt + tool_use + shown + said, [-100] * 40 + tool_use + [-100] * len(shown) + said)
        for shown, said in ((result, words(5, 6)), (other_result, words(3, 7)))
    ]
    filling = Answer(words(9, 8), [-100] * 9)
    return [
        *(answer(prompt, words(9, seed)) for seed in (10, 11)),
        *(answer(prompt[:1], words(count, 12)) for count in (5, 2)),
        answer([5], [6, 7]),
        answer([9], [8]),
        *(answer(prompt[:7], beginning + words(4, seed)) for seed in (13, 14)),
        *middle,
        filling,
        filling,
    ]


def log_probs_by_hand(model, answers: list[Answer]) -> list[float]:
    """From the model's own logits of one answer after the other."""
    found = []
    for ids, labels, _ in answers:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found += [logits[at - 1, label].item() for at, label in enumerate(labels) if at and label != -100]
    return found


def laid_out(kind: str, answers: list[Answer]) -> dict:
    if kind == "shared":
        return Shared(PAD)(answers)
    return Apart(DataCollatorForLanguageModeling(PAD, padding_free=kind == "flattened"))(answers)


@pytest.mark.parametrize("kind", ["apart", "shared"])
def test_every_layout_gives_each_token_the_log_probability_that_it_has_in_its_answer_alone(kind, model, pairs):
    batch = laid_out(kind, pairs)
    with torch.no_grad():
        found = model(**model_inputs(batch), lesson=gold_log_probs)
    assert found.tolist() == pytest.approx(log_probs_by_hand(model, pairs), abs=2e-5)
    trained = [sum(label != -100 for label in pair.labels[1:]) for pair in pairs]
    assert sum_by_answer(torch.ones(len(found)), trained_owners(batch), batch["answers"]).tolist() == trained


def test_a_flattened_batch_has_the_same_tokens_with_the_same_owners(pairs):
    flattened, apart = laid_out("flattened", pairs), laid_out("apart", pairs)
    assert flattened["input_ids"].shape[0] == 1 and flattened["answers"] == apart["answers"] == len(pairs)
    assert trained_owners(flattened).tolist() == trained_owners(apart).tolist()
    assert flattened["cu_seq_lens_q"].diff().tolist() == [len(pair.ids) for pair in pairs]


def test_gradients_are_the_same_whether_a_prompt_is_read_once_or_twice(model, pairs):
    gradients = []
    for kind in ("apart", "shared"):
        batch = laid_out(kind, pairs)
        model.zero_grad()
        sums = sum_by_answer(model(**model_inputs(batch), lesson=gold_log_probs), trained_owners(batch), batch["answers"])
        # What a preference loss does: one answer up, the other down, by an amount that depends on both.
        (-torch.nn.functional.logsigmoid(0.01 * (sums[0::2] - sums[1::2]))).sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=2e-3, atol=2e-6, msg=name)


def test_a_tool_result_between_an_answers_words_has_no_part_in_the_loss_whatever_its_label_would_be(model, pairs):
    """Against the sum by hand over what was said alone; were the result's tokens labelled, the sum would be another by far."""
    chosen, rejected = pairs[8:10]
    batch = laid_out("shared", [chosen, rejected])
    with torch.no_grad():
        sums = sum_by_answer(model(**model_inputs(batch), lesson=gold_log_probs), trained_owners(batch), 2)
    by_hand = [sum(log_probs_by_hand(model, [side])) for side in (chosen, rejected)]
    assert sums.tolist() == pytest.approx(by_hand, abs=1e-4)
    as_if_said = Answer(chosen.ids, [-100] * 40 + chosen.ids[40:])
    assert sum(log_probs_by_hand(model, [as_if_said])) < by_hand[0] - 1


def test_a_prompt_ends_where_the_answers_differ_or_the_policy_speaks(pairs):
    assert [shared_prompt(*pairs[at : at + 2]) for at in range(0, 12, 2)] == [40, 1, 0, 7, 40, 9]


def test_the_mask_lets_no_answer_see_the_other_and_the_rejected_one_see_the_repeated_token():
    segments = torch.tensor([[0, 0, 1, 1, 2, 2, 3]])
    seen = {at: row.nonzero().flatten().tolist() for at, row in enumerate(shared_mask(segments)[0, 0])}
    assert seen == {0: [0], 1: [0, 1], 2: [0, 1, 2], 3: [0, 1, 2, 3], 4: [0, 4], 5: [0, 4, 5], 6: [0, 1, 6]}


def test_a_shared_row_reads_less_than_its_two_answers(pairs):
    shared, apart = laid_out("shared", pairs[:2]), laid_out("apart", pairs[:2])
    assert shared["attention_mask"].sum() == 40 + 9 + 1 + 9
    assert apart["attention_mask"].sum() == 2 * (40 + 9)


def test_what_a_reference_said_before_stands_in_the_order_of_the_trained_tokens(pairs):
    rows = [
        {
            "chosen_input_ids": chosen.ids,
            "chosen_labels": chosen.labels,
            "chosen_reference": [float(number) for number in range(sum(label != -100 for label in chosen.labels))],
            "rejected_input_ids": rejected.ids,
            "rejected_labels": rejected.labels,
            "rejected_reference": [-1.0 - number for number in range(sum(label != -100 for label in rejected.labels))],
        }
        for chosen, rejected in zip(pairs[0::2], pairs[1::2], strict=True)
    ]
    for kind in ("apart", "shared", "flattened"):
        batch = laid_out(kind, answers_of_pairs(rows))
        by_answer = [batch["reference"][trained_owners(batch) == number].tolist() for number in range(batch["answers"])]
        assert by_answer == [reference for row in rows for reference in (row["chosen_reference"], row["rejected_reference"])]


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 64},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"_attn_implementation": "eager"},
        {"layers_block_type": ["mamba", "attention"]},
        {"sliding_window_pattern": 6},
        {"attention_chunk_size": 8192},
        {"alibi": True},
        {"forward": lambda input_ids, attention_mask: None},
    ],
)
def test_prompts_are_not_shared_where_a_mask_does_not_say_all_of_the_attention(model, change):
    def like(change: dict) -> SimpleNamespace:
        config = model.config.__class__.from_dict(model.config.to_dict())
        for name, value in {"_attn_implementation": "sdpa", **change}.items():
            setattr(config, name, value)
        forward = change.get("forward", model.model.forward)
        return SimpleNamespace(config=config, base_model=SimpleNamespace(forward=forward))

    assert shares_prompts(model) and shares_prompts(like({})) and shares_prompts(like({"alibi": False}))
    assert not shares_prompts(like(change))


def test_prompts_are_shared_under_an_adapter_as_without_it(model):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"]))
    assert shares_prompts(adapted)
    adapted.config.alibi = True
    assert not shares_prompts(adapted)
