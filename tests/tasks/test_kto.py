"""KTO by real ranks against a hand-written one in float64: two steps of plain gradient descent, of which the second begins from a policy
that is no longer its reference, so that answers which do not belong to their prompts tell how far it is."""

import pytest
import torch
from test_dpo import check_weights, log_probability, logged, rows_of, train
from transformers import AutoModelForCausalLM

from harness.embedded import resolve

BETA, RATE, STEPS = 0.5, 0.05, 2
KTO = ["task=kto", "dpo={}", f"kto.beta={BETA}", "kto.desirable_weight=1.2", "kto.undesirable_weight=0.8"]
KTO += ['data.train=[{path: "embedded:answers-train", max_rows: 8}]']


def kto_by_hand(rows: list[dict]):
    """(losses of the steps, estimates of the divergence, weights after them), an answer at a time."""
    base = AutoModelForCausalLM.from_pretrained(resolve("embedded:tiny-llama"), dtype=torch.float64, attn_implementation="eager").eval()
    trained = {name: parameter.detach().clone().requires_grad_() for name, parameter in base.named_parameters()}

    def log_probabilities(values, answers) -> list[torch.Tensor]:
        return [log_probability(lambda **inputs: torch.func.functional_call(base, values, (), inputs), *answer) for answer in answers]

    own = [(row["input_ids"], row["labels"]) for row in rows]
    foreign = []
    for at, row in enumerate(rows):
        prompt = row["input_ids"][: row["prompt_length"]]
        for other in rows[at + 1 :] + rows[:at]:
            if other["input_ids"][: other["prompt_length"]] != prompt:
                break
        labels = [-100] * len(prompt) + other["labels"][other["prompt_length"] :]
        foreign.append((prompt + other["input_ids"][other["prompt_length"] :], labels))
    with torch.no_grad():
        reference, foreign_reference = log_probabilities(trained, own), log_probabilities(trained, foreign)
    losses, divergences = [], []
    for _ in range(STEPS):
        with torch.no_grad():
            ratios = [new - old for new, old in zip(log_probabilities(trained, foreign), foreign_reference, strict=True)]
            divergence = max(float(sum(ratios)) / len(ratios), 0.0)
        terms = []
        for row, new, old in zip(rows, log_probabilities(trained, own), reference, strict=True):
            away = (new - old) - divergence if row["label"] else divergence - (new - old)
            terms.append((1.2 if row["label"] else 0.8) * (1 - torch.sigmoid(BETA * away)))
        loss = sum(terms) / len(terms)
        gradients = torch.autograd.grad(loss, list(trained.values()))
        losses.append(loss.item())
        divergences.append(divergence)
        trained = {
            name: (value - RATE * gradient).detach().requires_grad_()
            for (name, value), gradient in zip(trained.items(), gradients, strict=True)
        }
    return losses, divergences, {name: value.detach() for name, value in trained.items()}


def test_two_steps_over_two_ranks_are_those_by_hand_in_float64(tmp_path):
    run = train(tmp_path, *KTO, world=2, backend="ddp")
    losses, divergences, trained = kto_by_hand(rows_of(run))
    assert logged(run, "train/loss") == pytest.approx(losses, abs=1e-5)
    assert logged(run, "train/kl_baseline") == pytest.approx(divergences, abs=1e-4)
    assert divergences[0] == 0 and divergences[1] > 1 and abs(losses[1] - losses[0]) > 1e-3
    check_weights(run, trained, "model.safetensors")
