"""Losses of preference against TRL's own trainers, fed with the same log-probabilities, and against the formulas written out in Python."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from harness.losses.preference import PAIR_LOSSES, Pairs, answer_loss, divergence_of_tokens, pair_loss

BETA, SMOOTHING, B, T = 0.3, 0.1, 3, 6


@pytest.fixture
def tokens():
    """Log-probabilities [2B, T] in float64 of tokens of the policy and the reference, and which of them count."""
    generator = torch.Generator().manual_seed(5)
    policy, reference = (-3 * torch.rand(2 * B, T, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = torch.tensor([6, 2, 4, 3, 5, 1])
    mask = (torch.arange(T) < lengths[:, None]).long()
    return policy * mask, reference * mask, mask


def pairs_of(policy, reference, mask) -> Pairs:
    (chosen, rejected), (ref_chosen, ref_rejected), counts = (part.sum(1).chunk(2) for part in (policy, reference, mask))
    return Pairs(chosen, rejected, ref_chosen, ref_rejected, *counts)


def trl_loss(trainer, policy, mask, inputs, **settings):
    """What TRL's own method makes of these log-probabilities, with everything around it taken away."""
    per_token = SimpleNamespace(log_probs=policy, entropy=policy.detach(), mean_logits=policy.detach(), is_top1=mask.bool())
    whole = SimpleNamespace(device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value)
    itself = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=whole,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        beta=BETA,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        args=SimpleNamespace(discopop_tau=0.05),
        **settings,
    )
    ids = torch.zeros(len(mask), T + 1, dtype=torch.long)
    completion = torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask], 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion, **inputs}
    return trainer._compute_loss(itself, lambda **_: per_token, batch, False)


def trl_pair_loss(policy, reference, mask, losses, weights=None):
    ref_chosen, ref_rejected = reference.sum(1).chunk(2)
    return trl_loss(
        DPOTrainer,
        policy,
        mask,
        {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected},
        loss_types=losses,
        loss_weights=weights or [1.0] * len(losses),
        label_smoothing=SMOOTHING,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )


@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if name != "sft"])
def test_each_loss_and_its_gradient_are_trls(name, tokens):
    policy, reference, mask = tokens
    ours, theirs = policy.clone().requires_grad_(), policy.clone().requires_grad_()
    loss = pair_loss(pairs_of(ours, reference, mask), [name], beta=BETA, label_smoothing=SMOOTHING).mean()
    expected = trl_pair_loss(theirs, reference, mask, [name])
    loss.backward()
    expected.backward()
    # TRL's exo_pair has its smoothing in float32.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-7)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)
    assert ours.grad.abs().sum() > 0


def test_the_cross_entropy_of_one_pair_is_trls_and_of_several_it_is_the_mean_over_pairs(tokens):
    policy, reference, mask = tokens
    one = [0, B]
    ours = pair_loss(pairs_of(policy[one], reference[one], mask[one]), ["sft"], beta=BETA).mean()
    assert ours.item() == pytest.approx(trl_pair_loss(policy[one], reference[one], mask[one], ["sft"]).item())
    all_of_them = pair_loss(pairs_of(policy, reference, mask), ["sft"], beta=BETA)
    by_hand = [-sum(policy[row, : int(mask[row].sum())].tolist()) / int(mask[row].sum()) for row in range(B)]
    assert all_of_them.tolist() == pytest.approx(by_hand)


def test_several_losses_are_added_with_their_weights(tokens):
    policy, reference, mask = tokens
    names, weights = ["sigmoid", "bco_pair", "ipo"], [0.8, 0.2, 1.5]
    ours = pair_loss(pairs_of(policy, reference, mask), names, weights, beta=BETA).mean()
    assert ours.item() == pytest.approx(trl_pair_loss(policy, reference, mask, names, weights).item())


def test_the_sigmoid_loss_is_the_formula_of_the_paper(tokens):
    policy, reference, mask = tokens
    pairs = pairs_of(policy, reference, mask)
    for row, loss in enumerate(pair_loss(pairs, ["sigmoid"], beta=BETA).tolist()):
        ratio = [sum(policy[at].tolist()) - sum(reference[at].tolist()) for at in (row, B + row)]
        assert loss == pytest.approx(-math.log(1 / (1 + math.exp(-BETA * (ratio[0] - ratio[1])))))


def test_a_policy_that_is_its_reference_has_the_loss_of_a_coin(tokens):
    policy, _, mask = tokens
    assert pair_loss(pairs_of(policy, policy, mask), ["sigmoid"], beta=BETA).tolist() == pytest.approx([math.log(2)] * B)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_the_loss_of_single_answers_and_its_gradient_are_trls(loss_type, tokens):
    policy, reference, mask = tokens
    good = torch.tensor([True, False, True, True, False, False])
    kl_logps, ref_kl_logps = torch.tensor([-4.0, -7.5, -3.0]).double(), torch.tensor([-5.0, -8.5, -4.5]).double()
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    theirs, ours = policy.clone().requires_grad_(), policy.clone().requires_grad_()
    expected = trl_loss(
        KTOTrainer,
        theirs,
        mask,
        {"label": good, "ref_logps": reference.sum(1), "ref_KL_logps": ref_kl_logps},
        loss_type=loss_type,
        calculate_KL=loss_type == "kto",
        _compute_kl_logps=lambda model, batch: kl_logps,
        **weights,
    )
    divergence = (kl_logps - ref_kl_logps).mean().clamp(min=0) if loss_type == "kto" else None
    loss = answer_loss((ours - reference).sum(1), good, divergence, beta=BETA, **weights).mean()
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_divergence_of_tokens_is_kl_on_average_over_what_the_policy_draws():
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    mean = (p * divergence_of_tokens(p.log(), q.log())).sum().item()
    assert mean == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)))
    assert (divergence_of_tokens(p.log(), q.log()) >= 0).all()
    assert divergence_of_tokens(torch.tensor(-500.0), torch.tensor(0.0)).isfinite()
