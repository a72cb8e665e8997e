"""The guard: when a step is bad, what follows from it, and that a step left out leaves no trace."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness.guard import Guard, skip_update, windows_of
from harness.recipe.schema import Guard as Settings
from harness.recipe.schema import Optimizer

NAN, INF = float("nan"), float("inf")


def guard(*, fp16: bool = False, rolled_back=(), **settings) -> Guard:
    return Guard(Settings(**settings), fp16=fp16, rolled_back=rolled_back)


def decisions(guarded: Guard, losses: list[float], first: int = 1) -> list[str]:
    """What is decided on steps in a row, by their losses; nan stands for a loss that is not a number."""
    return [guarded.decide(float(loss != loss), loss, step) for step, loss in enumerate(losses, first)]


# ---- what follows from a bad step


def test_three_bad_steps_in_a_row_are_skipped_and_the_fourth_rolls_back():
    assert decisions(guard(), [2.0, NAN, NAN, NAN, NAN]) == ["step", "skip", "skip", "skip", "roll_back"]


def test_a_good_step_in_between_begins_a_new_row():
    assert decisions(guard(max_skips=2), [NAN, NAN, 2.0, NAN, NAN, NAN]) == ["skip", "skip", "step", "skip", "skip", "roll_back"]


def test_without_skips_the_first_bad_step_rolls_back():
    assert decisions(guard(max_skips=0), [2.0, INF]) == ["step", "roll_back"]


def test_without_rollbacks_the_run_stops_where_it_would_roll_back():
    assert decisions(guard(max_skips=1, max_rollbacks=0), [NAN, NAN]) == ["skip", "stop"]


def test_after_as_many_rollbacks_as_are_allowed_the_run_stops():
    assert decisions(guard(max_skips=0, max_rollbacks=2, rolled_back=[(3, 5)]), [NAN]) == ["roll_back"]
    assert decisions(guard(max_skips=0, max_rollbacks=2, rolled_back=[(3, 5), (8, 9)]), [NAN]) == ["stop"]


def test_the_steps_that_a_rollback_passes_over_end_a_row():
    # A checkpoint was made after two bad steps, 4 and 5; the run came back to it and passes over 6 and 7.
    before = guard(max_skips=2)
    assert decisions(before, [2.0, 2.0, 2.0, NAN, NAN]) == ["step"] * 3 + ["skip"] * 2
    back = guard(max_skips=2, rolled_back=[(6, 7)])
    back.load_state(before.state())
    assert [step for step in range(4, 10) if back.passes_over(step)] == [6, 7]
    assert decisions(back, [NAN, NAN, NAN], first=8) == ["skip", "skip", "stop"]


def test_every_rollback_of_the_ledger_counts_not_only_the_last():
    events = [
        {"event": "life_began", "attempt": 1},
        {"event": "rolled_back", "attempt": 1, "from_step": 9, "to_step": 4, "passes_over": [5, 9], "rows": [1, 2]},
        {"event": "committed", "attempt": 2, "step": 12},
        {"event": "rolled_back", "attempt": 2, "from_step": 14, "to_step": 12, "passes_over": [13, 14], "rows": [3]},
    ]
    windows = windows_of(json.loads(json.dumps(events)))
    assert windows == [(5, 9), (13, 14)]
    assert [step for step in range(1, 17) if guard(rolled_back=windows).passes_over(step)] == [5, 6, 7, 8, 9, 13, 14]


# ---- what makes a step bad


def test_one_rank_that_finds_a_step_bad_is_enough_and_the_reason_is_said():
    guarded = guard()
    assert guarded.decide(1.0, 2.0, 1) == "skip" and guarded.why == "a gradient is not finite on 1 rank"
    assert guarded.decide(3.0, 2.0, 2) == "skip" and guarded.why == "a gradient is not finite on 3 ranks"
    assert guarded.decide(1.0, INF, 3) == "skip" and guarded.why == "its loss is inf"
    assert guarded.decide(0.0, 2.0, 4) == "step" and guarded.why == ""


def test_a_loss_far_above_the_median_is_bad_only_when_a_factor_is_given():
    assert decisions(guard(spike_factor=3), [2.0] * 16 + [6.0, 6.1]) == ["step"] * 17 + ["skip"]
    assert decisions(guard(), [2.0] * 16 + [6e9]) == ["step"] * 17


def test_a_spike_is_judged_only_once_there_are_enough_good_losses():
    assert decisions(guard(spike_factor=3), [2.0] * 15 + [100.0]) == ["step"] * 16
    assert decisions(guard(spike_factor=3), [2.0] * 16 + [100.0]) == ["step"] * 16 + ["skip"]


def test_the_median_is_that_of_the_last_losses_and_of_good_ones_alone():
    falling = guard(spike_factor=3)
    decisions(falling, [9.0] * 64 + [1.0] * 64)
    assert falling.decide(0.0, 3.5, 129) == "skip" and "3 times 1, the median of the last 64" in falling.why
    spikes = guard(spike_factor=3, max_skips=1000)
    assert set(decisions(spikes, [1.0] * 16 + [50.0] * 200)[16:]) == {"skip"}, "spikes would become the usual"


def test_a_loss_below_zero_is_never_a_spike():
    assert set(decisions(guard(spike_factor=2), [-1.0] * 16 + [0.0, -0.5, 3.0])) == {"step"}


def test_a_guard_restored_at_any_step_decides_as_the_uninterrupted_one():
    losses = [2.0 + 0.01 * (step % 7) for step in range(100)]
    losses[30:32], losses[70:72], losses[90] = [NAN, NAN], [9.0, 8.0], NAN
    settings = {"spike_factor": 3, "max_skips": 1, "max_rollbacks": 99}
    whole = decisions(guard(**settings), losses)
    assert {"step", "skip", "roll_back"} == set(whole)
    for cut in range(1, 100):
        first, second = guard(**settings), guard(**settings)
        decisions(first, losses[:cut])
        second.load_state(json.loads(json.dumps(first.state(), allow_nan=False)))
        assert decisions(second, losses[cut:], first=cut + 1) == whole[cut:], cut


# ---- one rank's verdict


def verdict(losses: list[float], gradient_norm, **settings):
    import torch

    guarded = guard(**settings)
    for loss in losses:
        guarded.observe(torch.tensor(loss, dtype=torch.bfloat16))
    return guarded.local_verdict(gradient_norm)


def test_a_rank_finds_a_step_bad_when_a_loss_or_a_gradient_is_not_finite():
    import torch

    # The sum is kept in float32, whatever the losses are.
    assert verdict([1.5, 2**-12], torch.tensor(3.0)) == (False, 1.5 + 2**-12)
    assert verdict([1.5, 2**-12], 3.0) == (False, 1.5 + 2**-12)
    assert verdict([1.5, NAN], torch.tensor(3.0))[0] and verdict([INF, -INF], 3.0)[0]
    assert verdict([1.5], torch.tensor(INF))[0] and verdict([1.5], torch.tensor(NAN))[0]


def test_under_fp16_an_infinite_gradient_is_left_to_the_loss_scaler_but_not_a_loss():
    assert verdict([1.5], INF, fp16=True) == (False, 1.5)
    assert verdict([NAN], 1.0, fp16=True)[0]


def test_each_step_is_judged_by_its_own_losses():
    import torch

    guarded = guard()
    guarded.observe(torch.tensor(NAN))
    assert guarded.local_verdict(1.0)[0]
    guarded.observe(torch.tensor(0.1))
    guarded.observe(torch.tensor(0.2))
    bad, loss = guarded.local_verdict(1.0)
    assert not bad and loss == pytest.approx(0.3)


def test_the_sum_of_micro_batches_of_unequal_length_is_the_mean_over_the_tokens_of_the_step(tmp_path):
    """transformers' loss of a micro-batch is divided by the tokens of the whole step: so it is added up, not averaged."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model, guarded, sums = LlamaForCausalLM(config), guard(), []

    class Watched(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            guarded.observe(loss)
            return loss

        def _get_grad_norm(self, model, grad_norm=None):
            grad_norm = super()._get_grad_norm(model, grad_norm)
            sums.append(guarded.local_verdict(grad_norm)[1])
            return grad_norm

    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 32, (2, 12)).tolist()]
    rows[0]["labels"] = [-100] * 9 + rows[0]["labels"][9:]
    with torch.no_grad():
        nll = [
            torch.nn.functional.cross_entropy(
                model(torch.tensor([row["input_ids"]])).logits[0, :-1].double(), torch.tensor(row["labels"][1:]), reduction="sum"
            )
            for row in rows
        ]
    args = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Watched(model, args, train_dataset=rows).train()
    assert sums == [pytest.approx(float(sum(nll)) / (3 + 11), rel=1e-5)]


# ---- an update that is left out


def prepared(optim: str, folder: Path, scaler=None):
    """(model, Accelerate's optimizer, its schedule), made as the Trainer makes them."""
    import torch
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import Trainer, TrainingArguments, get_scheduler

    torch.manual_seed(0)
    model = torch.nn.Linear(64, 80)
    args = TrainingArguments(str(folder), optim=optim, use_cpu=True, report_to="none", learning_rate=1e-2)
    kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    inner = kind(model.parameters(), **kwargs)
    accelerator = Accelerator(cpu=True)
    optimizer = AcceleratedOptimizer(inner, scaler=scaler) if scaler else accelerator.prepare(inner)
    return model, optimizer, get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=10)


def take_step(model, optimizer, schedule, number: int, *, skipped: bool = False, poisoned: bool = False) -> None:
    """One step as transformers' Trainer takes it."""
    import torch

    loss = model(torch.randn(4, 64, generator=torch.Generator().manual_seed(number))).square().mean()
    scaler = optimizer.scaler
    (scaler.scale(loss) if scaler else loss).backward()
    if poisoned:
        model.weight.grad[0, 0] = NAN
    if scaler:
        scaler.unscale_(optimizer.optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if skipped:
        skip_update(optimizer)
    optimizer.step()
    if not optimizer.step_was_skipped:
        schedule.step()
    model.zero_grad()


def everything(model, optimizer) -> list[str]:
    """Weights, moments and counts, as digests of their bytes."""
    import torch
    from xxhash import xxh3_128_hexdigest

    states = [copy.deepcopy(optimizer.state[parameter]) for parameter in model.parameters()]
    found = [parameter.detach().clone() for parameter in model.parameters()]
    found += [torch.as_tensor(value) for state in states for _, value in sorted(state.items())]
    return [xxh3_128_hexdigest(value.numpy().tobytes()) for value in found]


@pytest.mark.parametrize("poisoned", [True, False], ids=["not a number", "finite"])
@pytest.mark.parametrize("optim", Optimizer.__args__)
def test_a_skipped_step_leaves_weights_moments_and_counts_as_they_were(optim, poisoned, tmp_path):
    kept, twin = prepared(optim, tmp_path), prepared(optim, tmp_path)
    for number in (1, 2):
        take_step(*kept, number)
        take_step(*twin, number)
    before = everything(*kept[:2])
    take_step(*kept, 99, skipped=True, poisoned=poisoned)
    assert everything(*kept[:2]) == before
    assert kept[2].get_last_lr() == pytest.approx([0.01 * (1 - 3 / 10)]), "the schedule goes on"
    # And the step after it is what it would have been, at the learning rate that it has.
    twin[2].step()
    take_step(*kept, 3)
    take_step(*twin, 3)
    assert everything(*kept[:2]) == everything(*twin[:2]) != before


def test_a_skipped_step_is_not_the_loss_scalers_business(tmp_path):
    import torch

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    kept = prepared("adamw_torch", tmp_path, scaler)
    take_step(*kept, 1)
    take_step(*kept, 2, poisoned=True)
    assert kept[1].step_was_skipped and scaler.get_scale() == 512.0, "the scaler's own doing, which holds the schedule back"
    before, scale = everything(*kept[:2]), scaler.state_dict()
    for number in (3, 4):
        take_step(*kept, number, skipped=True, poisoned=number == 3)
        assert not kept[1].step_was_skipped
        assert everything(*kept[:2]) == before and scaler.state_dict() == scale
    assert kept[2].get_last_lr() == pytest.approx([0.01 * (1 - 3 / 10)])
    take_step(*kept, 5)
    assert everything(*kept[:2]) != before and not kept[1].step_was_skipped


# ---- DeepSpeed's ranks


def check_ranks(folder: Path, *cases: str) -> None:
    """Two real ranks; what is compared, and with what, is said in guard_ranks.py."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "tests/guard_ranks.py", folder, *cases],
        capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert json.loads((folder / f"sharded-{rank}.json").read_text()) == [False, True]
        for case in cases:
            seen = json.loads((folder / f"{case}-{rank}.json").read_text())
            assert seen["changed_by_skip"] == [] and seen["differs_from_never"] == [], (case, seen)
            assert seen["overflow"] == [False] * 3, "the schedule would be held back"
            assert seen["applied"] == 5 and seen["skipped_steps"] == 0
            assert seen["global_steps"] == 8 and seen["global_samples"] == 8 * 2 * 2 * 4, "a step that is left out counts as one"
            assert len([name for name in seen["moved"] if name.startswith(("module", "master", "exp_avg"))]) >= 9, "nothing was compared"
            # Under fp16 only a loss counts, and it is rank 1 whose rows are not numbers.
            nan_is_seen = "float16" not in case.split("-") or rank == 1
            assert seen["bad"] == [False, nan_is_seen, False, False, False, False, nan_is_seen, False], case


def test_a_step_that_deepspeed_leaves_out_leaves_no_trace(tmp_path):
    check_ranks(tmp_path, "zero2-float32")


@pytest.mark.slow
def test_on_every_stage_in_every_type_a_step_that_deepspeed_leaves_out_leaves_no_trace(tmp_path):
    stages = ["zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"]
    check_ranks(tmp_path, *(f"{stage}-{dtype}" for stage in stages for dtype in ("float32", "bfloat16", "float16")))
