"""Tracking end to end: what a run writes, that W&B and metrics.jsonl say the same, and that the numbers are right."""

import io
import json
import math
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, MixtralConfig, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from wandb_files import closed_wandb_files, machine_without_wandb, records, section, wandb_history  # noqa: F401 - an autouse fixture

from harness.errors import HarnessError
from harness.planner.flops import FlopCount, peak_flops
from harness.run import git_commit
from harness.tracking import plot_losses, read_metrics
from harness.tracking.callback import TrackingCallback
from harness.tracking.flops import count_flops, count_model_flops, flops_per_token
from harness.tracking.metrics import MetricsFile, loss_curve, metric_key, smooth
from harness.tracking.progress import ProgressCallback, format_duration, format_small
from harness.tracking.throughput import Throughput
from harness.tracking.wandb_run import choose_mode, has_credentials, redact

TINY = dict(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


# ---- metrics.jsonl and W&B


def test_both_records_have_the_same_keys_and_steps_and_a_second_life_goes_on_under_the_same_id(tmp_path):
    for life in range(2):
        callback = TrackingCallback(tmp_path, section(), {"train": {"learning_rate": 1e-4}}, is_main=True, backend="ddp", world_size=2)
        callback.log(10 + life, {"loss": 1.5, "grad_norm": torch.tensor(0.25), "epoch": 0.1, "speed/tokens_per_s": 100.0})
        callback.log(10 + life, {"eval_loss": 1.25, "eval_mean_token_accuracy": 0.5})
        callback.finish(0)
    run_id = json.loads((tmp_path / "wandb.json").read_text())["id"]
    files = closed_wandb_files(tmp_path, lives=2)
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * 2
    history = [line for file in files for line in wandb_history(file)]
    assert [line.pop("_step") for line in history] == [0, 1, 2, 3]
    ours = [{key: value for key, value in line.items() if key != "time"} for line in read_metrics(tmp_path)]
    assert [{key: value for key, value in line.items() if not key.startswith("_")} for line in history] == ours
    assert ours[0] == {"step": 10, "train/loss": 1.5, "train/grad_norm": 0.25, "train/epoch": 0.1, "speed/tokens_per_s": 100.0}
    assert ours[3] == {"step": 11, "eval/loss": 1.25, "eval/mean_token_accuracy": 0.5}


def test_wandb_knows_the_recipe_the_commit_the_versions_and_the_launch_but_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "s3cret-of-the-environment")
    config = {
        "model": {"token": "hunter2-hunter2", "eos_token": "<eos>"},
        "url": "https://me:pw-in-url@host/x",
        "note": "s3cret-of-the-environment",
    }
    callback = TrackingCallback(tmp_path, section(tags=()), config, is_main=True, backend="zero2", world_size=4)
    callback.start()
    callback.finish(0)
    [file] = closed_wandb_files(tmp_path)
    [run] = [record.run for record in records(file) if record.HasField("run")]
    recorded = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert recorded["model"] == {"token": "[redacted]", "eos_token": "<eos>"}
    assert recorded["harness"]["backend"] == "zero2" and recorded["harness"]["world_size"] == 4
    assert recorded["harness"]["versions"]["torch"] == torch.__version__
    assert recorded["harness"]["git_commit"] == git_commit()
    assert run.project == "p" and run.display_name == tmp_path.name
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in (b"hunter2", b"pw-in-url", b"s3cret"):
        assert secret not in written


def test_the_export_becomes_an_artifact_with_its_lineage_offline_as_well(tmp_path):
    export = tmp_path / "final"
    export.mkdir()
    (export / "adapter_model.safetensors").write_bytes(b"weights")
    lineage = {"base_model": "llama", "data_fingerprint": "d1", "recipe_digest": "r1"}
    callback = TrackingCallback(tmp_path, section(), {}, is_main=True)
    callback.start()
    callback.log_artifact(export, lineage)
    callback.finish(0)
    [file] = closed_wandb_files(tmp_path)
    [artifact] = [record.artifact for record in records(file) if record.HasField("artifact")]
    assert artifact.type == "model" and json.loads(artifact.metadata) == lineage
    assert [entry.path for entry in artifact.manifest.contents] == ["adapter_model.safetensors"]
    assert artifact.manifest.contents[0].local_path == str(export / "adapter_model.safetensors")  # not a copy


def test_other_ranks_write_nothing(tmp_path):
    callback = TrackingCallback(tmp_path, section(), {}, is_main=False)
    callback.on_train_begin(None, None, None)
    callback.log(1, {"loss": 1.0})
    callback.log_artifact(tmp_path, {})
    callback.finish(0)
    assert list(tmp_path.iterdir()) == []


def test_tracking_that_is_off_still_writes_metrics_and_never_imports_wandb(tmp_path):
    program = f"""
        import sys
        from pathlib import Path
        from types import SimpleNamespace
        from harness.tracking.callback import TrackingCallback
        callback = TrackingCallback(Path({str(tmp_path)!r}), SimpleNamespace(mode="disabled"), {{}}, is_main=True)
        callback.log(1, {{"loss": 2.0}})
        callback.finish(0)
        assert "wandb" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert read_metrics(tmp_path)[0]["train/loss"] == 2.0


@pytest.mark.slow
def test_a_network_that_fails_leaves_an_offline_run_and_one_clear_line(tmp_path):
    """In a process of its own: W&B keeps the credentials of the first run of a process. Takes W&B's time for giving up, 30 s."""
    program = f"""
        from pathlib import Path
        from types import SimpleNamespace
        from harness.tracking.callback import TrackingCallback
        tracking = SimpleNamespace(project="p", entity=None, name=None, group=None, tags=(), mode="online")
        callback = TrackingCallback(Path({str(tmp_path)!r}), tracking, {{}}, is_main=True)
        callback.log(1, {{"loss": 2.0}})
        callback.finish(0)
    """
    environment = {**os.environ, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0123456789" * 4}
    del environment["WANDB_MODE"]
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [line for line in run.stderr.splitlines() if "W&B:" in line and "recording offline instead" in line]
    [file] = closed_wandb_files(tmp_path)
    assert wandb_history(file)[0]["train/loss"] == 2.0
    assert not any(b"0123456789" * 4 in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_wandb_that_dies_is_said_once_and_the_run_goes_on(tmp_path, caplog):
    callback = TrackingCallback(tmp_path, section(), {}, is_main=True)
    callback.start()

    def lose_connection(*args, **kwargs):
        raise ConnectionResetError("Connection lost")

    callback._wandb._run.log, finish = lose_connection, callback._wandb._run.finish
    for step in range(3):
        callback.log(step, {"loss": 1.0})
    callback.finish(0)
    finish()
    assert [record.message for record in caplog.records if "W&B: cannot" in record.message] == [
        "W&B: cannot log (Connection lost); this run goes on without it, metrics.jsonl has everything"
    ]
    assert len(read_metrics(tmp_path)) == 3


def test_a_table_that_cannot_be_logged_is_left_out_and_the_lines_go_on(tmp_path, caplog):
    callback = TrackingCallback(tmp_path, section(), {}, is_main=True)
    callback.log(0, {"loss": 1.0})
    log, failed = callback._wandb._run.log, []

    def full_disk_for_tables(values, **options):
        if "eval/failing_calls" in values and not failed:
            failed.append(values)
            raise OSError(28, "No space left on device")
        log(values, **options)

    callback._wandb._run.log = full_disk_for_tables
    for step in (1, 2):
        callback.log_table(step, "eval/failing_calls", ("question", "said"), [("Rome?", f"answer {step}")])
        callback.log(step, {"loss": 1.0 + step})
    callback.log_table(3, "eval/failing_calls", ("question", "said"), [])
    callback.finish(0)
    assert [record.message for record in caplog.records if "W&B: cannot" in record.message] == [
        "W&B: cannot log the table eval/failing_calls ([Errno 28] No space left on device); it is left out"
    ]
    (file,) = closed_wandb_files(tmp_path)
    assert [line["train/loss"] for line in wandb_history(file)] == [1.0, 2.0, 3.0]
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/eval/*.table.json")
    assert json.loads(table.read_text())["data"] == [["Rome?", "answer 2"]]


def test_a_value_that_is_not_finite_is_null_and_named(tmp_path):
    callback = TrackingCallback(tmp_path, section(mode="disabled"), {}, is_main=True)
    callback.log(7, {"loss": math.nan, "grad_norm": math.inf, "learning_rate": 1e-4})
    callback.finish(1)
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    del line["time"]
    assert line == {
        "step": 7,
        "train/loss": None,
        "train/grad_norm": None,
        "train/learning_rate": 1e-4,
        "non_finite": "train/loss=nan train/grad_norm=inf",
    }


def test_a_torn_line_is_left_out_named_and_does_not_spoil_the_next_life(tmp_path, caplog):
    file = MetricsFile(tmp_path, now=lambda: 0.0)
    file.append(1, {"train/loss": 3.0})
    file.close()
    with (tmp_path / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 2, "time": 0.0, "train/lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    assert "metrics.jsonl:2: torn line" in caplog.text
    second = MetricsFile(tmp_path, now=lambda: 0.0)
    assert second.rows == 2  # W&B's counter must not stand still, whatever the first life had sent
    second.append(2, {"train/loss": 2.0})
    second.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path):
    file = MetricsFile(tmp_path)
    file.append(1, {"train/loss": 3.0})
    assert read_metrics(tmp_path)[0]["train/loss"] == 3.0
    file.close()


def test_a_folder_without_metrics_is_said(tmp_path):
    with pytest.raises(HarnessError, match="metrics.jsonl: not there"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("loss", "train/loss"), ("grad_norm", "train/grad_norm"), ("learning_rate", "train/learning_rate"), ("epoch", "train/epoch"),
        ("entropy", "train/entropy"), ("mean_token_accuracy", "train/mean_token_accuracy"), ("num_tokens", "train/num_tokens"),
        ("eval_loss", "eval/loss"), ("eval_entropy", "eval/entropy"), ("eval_runtime", "eval/runtime_s"),
        ("eval_samples_per_second", "eval/samples_per_s"), ("eval_rewards/chosen", "eval/rewards/chosen"),
        ("train_runtime", "run/runtime_s"), ("train_steps_per_second", "run/steps_per_s"), ("train_loss", "run/mean_train_loss"),
        ("total_flos", "run/total_flos"), ("rewards/chosen", "train/rewards/chosen"), ("anything_new", "train/anything_new"),
        ("speed/mfu", "speed/mfu"), ("tools/exact_match", "tools/exact_match"), ("speed", "train/speed"),
    ],
)  # fmt: skip
def test_keys_are_area_and_name(theirs, ours):
    assert metric_key(theirs) == ours


# ---- when W&B is online


@pytest.mark.parametrize(
    ("variable", "asked", "credentials", "mode"),
    [
        (None, "auto", True, "online"), (None, "auto", False, "offline"), (None, "online", False, "offline"),
        (None, "offline", True, "offline"), (None, "disabled", True, "disabled"), ("online", "disabled", True, "disabled"),
        ("offline", "auto", True, "offline"), ("offline", "online", True, "offline"),
        ("disabled", "auto", True, "disabled"), ("online", "auto", False, "offline"), ("dryrun", "auto", True, "offline"),
    ],
)  # fmt: skip
def test_wandb_is_online_only_where_it_can_log_in_and_nobody_said_otherwise(monkeypatch, variable, asked, credentials, mode):
    monkeypatch.delenv("WANDB_MODE")
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert choose_mode(asked, credentials) == mode


def test_a_setting_of_the_recipe_that_the_machine_overrules_is_said(caplog):
    choose_mode("online", credentials=True)
    assert "W&B: offline, because WANDB_MODE or WANDB_DISABLED of this machine beats tracking.mode=online" in caplog.text


def test_a_key_is_found_in_the_environment_and_in_netrc_for_the_right_host(monkeypatch, tmp_path):
    settings = SimpleNamespace(api_key=None, identity_token_file=None, base_url="https://api.wandb.ai")
    assert not has_credentials(settings)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert has_credentials(settings)
    assert not has_credentials(SimpleNamespace(**{**vars(settings), "base_url": "https://wandb.example.org"}))
    assert has_credentials(SimpleNamespace(**{**vars(settings), "base_url": "https://wandb.example.org", "api_key": "k"}))


def test_words_that_only_look_like_secrets_stay():
    config = {"eos_token": "<eos>", "max_new_tokens": 5, "api_key_name": "k", "tokens": ["a"]}
    assert redact(config) == config


# ---- throughput


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_speed_counts_what_is_real_and_leaves_evaluation_and_saving_out():
    clock = Clock()
    throughput = Throughput(clock=clock, flops=FlopCount(per_token=1000, per_trained_token=100, per_pair=10), peak_flops_per_s=20_000)
    throughput.on_train_begin(None, None, None)
    batch = {  # 3 + 2 real tokens, 2 + 1 of them trained; pairs 1+2+3 and 1+2
        "input_ids": torch.zeros(2, 4, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]]),
        "labels": torch.tensor([[-100, 5, 6, -100], [-100, -100, -100, 7]]),
    }
    for _ in range(2):  # two optimizer steps of two micro-batches, 4 s each, 1 s of it waiting
        with throughput.waiting():
            clock.now += 1.0
        throughput.count(batch)
        throughput.count(batch)
        clock.now += 3.0
        throughput.on_step_end(None, None, None)
        clock.now += 50.0
        throughput.on_evaluate(None, None, None)
        clock.now += 50.0
        throughput.on_save(None, None, None)
    logs = {"loss": 1.0}
    throughput.on_log(None, None, None, logs=logs)
    assert logs.pop("memory/peak_gib") > 0.01
    logs.pop("memory/peak_reserved_gib", None)
    assert logs == {
        "loss": 1.0,
        "speed/tokens_per_s": 20 / 8,
        "speed/trained_tokens_per_s": 12 / 8,
        "speed/samples_per_s": 8 / 8,
        "speed/step_s": 4.0,
        "speed/data_wait_s": 1.0,
        "speed/data_wait_fraction": 0.25,
        "speed/mfu": (20 * 1000 + 12 * 100 + 36 * 10) / (8 * 20_000),
    }


def test_packed_samples_are_counted_one_by_one_and_attend_only_to_themselves():
    clock = Clock()
    throughput = Throughput(clock=clock, flops=FlopCount(0, 0, 1), peak_flops_per_s=1)
    throughput.count({"input_ids": torch.zeros(1, 9, dtype=torch.long), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])})
    clock.now = 1.0
    measured = throughput.measure()
    assert measured["speed/samples_per_s"] == 3
    assert measured["speed/tokens_per_s"] == measured["speed/trained_tokens_per_s"] == 9
    assert measured["speed/mfu"] == (1 + 2 + 3 + 4) + (1 + 2) + (1 + 2 + 3)


def test_ranks_add_their_tokens_and_the_slowest_loader_and_the_fullest_memory_count():
    clocks, vectors = [Clock(), Clock()], []

    def keep(values):
        vectors.append(values)
        return values

    ranks = [Throughput(world_size=2, rank=rank, clock=clocks[rank], all_reduce_sum=keep) for rank in range(2)]
    for rank, throughput in enumerate(ranks):
        throughput.count({"input_ids": torch.zeros(1 + rank, 5, dtype=torch.long)})
        with throughput.waiting():
            clocks[rank].now += 1.0 + rank
        clocks[rank].now = 10.0
        throughput.measure()
    counts, slots = ([sum(pair) for pair in zip(*(vector[a:b] for vector in vectors), strict=True)] for a, b in ((0, 4), (4, None)))
    assert counts == [15, 15, 3, 3 * 15]
    assert [slot for slot in slots if slot in (1.0, 2.0)] == [1.0, 2.0]  # a slot per rank: the sum loses neither
    both = Throughput(world_size=2, rank=0, clock=clocks[0], all_reduce_sum=lambda values: counts + slots)
    clocks[0].now += 5.0
    measured = both.measure()
    assert measured["speed/tokens_per_s"] == 15 / 5
    assert measured["speed/data_wait_s"] == 2.0


def test_only_lines_about_training_steps_are_measured():
    throughput = Throughput()
    throughput.on_train_begin(None, None, None)
    throughput.on_step_end(None, None, None)
    for logs in ({"eval_loss": 1.0}, {"train_runtime": 1.0, "train_loss": 1.0}):
        before = dict(logs)
        throughput.on_log(None, None, None, logs=logs)
        assert logs == before


def test_watching_a_loader_times_the_loader_and_not_its_reader():
    clock = Clock()
    throughput = Throughput(clock=clock)

    def loader():
        for item in range(3):
            clock.now += 2.0
            yield item

    source = loader()
    seen = []
    for item in throughput.watch(source):
        clock.now += 5.0
        seen.append(item)
        if len(seen) == 1:
            break
    seen += list(throughput.watch(source))  # the trainer makes a new one around the same iterator for every step
    assert seen == [0, 1, 2]
    assert throughput.measure()["speed/data_wait_fraction"] == 6.0 / 11.0


# ---- operations


LLAMA_3_8B = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, tie_word_embeddings=False,
)  # fmt: skip


def test_llama_3_8b_by_hand():
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336  # q and o, k and v, gate and up and down: 218,103,808
    weights = 32 * layer + 128256 * 4096  # with the output head, without the looked-up embedding: 7,504,658,432
    assert weights == 7_504_658_432
    attention = 12 * 32 * 32 * 128 * (8192 + 1) / 2  # 12·L·h·d for each of the (T+1)/2 keys that a token sees on average
    config = LlamaConfig(**LLAMA_3_8B)
    assert flops_per_token(config, 8192) == 6 * weights + attention == 51_471_187_968
    rank_16 = 32 * 16 * ((4096 + 4096) * 2 + (4096 + 1024) * 2)  # r 16 on q, k, v, o
    assert flops_per_token(config, 8192, trainable_fraction=0, adapter_params=rank_16) == 4 * weights + 6 * rank_16 + attention


def test_the_causal_half_aside_we_agree_with_trl():
    from trl.trainer.utils import compute_flops_per_token

    config = LlamaConfig(**LLAMA_3_8B)
    assert count_flops(config).total(tokens=1, trained_tokens=1, pairs=8192) == compute_flops_per_token(config, 8192)


def test_a_token_pays_for_the_experts_that_it_visits():
    config = MixtralConfig(**TINY, num_local_experts=8, num_experts_per_tok=2)
    attention = 16 * 16 * 2 + 16 * 8 * 2
    body = 2 * (attention + 8 * 16 + 2 * 3 * 16 * 32)  # the router sees all experts, the token two
    assert count_flops(config).per_token == 6 * body
    assert count_model_flops(AutoModelForCausalLM.from_config(config)) == count_flops(config)


def test_a_model_that_ends_in_a_score_is_not_credited_with_a_head_over_the_vocabulary():
    config = LlamaConfig(**TINY)
    classifier = AutoModelForSequenceClassification.from_config(config)
    assert count_model_flops(classifier) == replace(count_flops(config), per_trained_token=0.0)


@pytest.mark.parametrize("tied", [False, True])
def test_what_trains_is_read_from_the_model(tied):
    from peft import LoraConfig, get_peft_model

    config = LlamaConfig(**TINY, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    assert count_model_flops(model) == count_flops(config)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    assert count_model_flops(adapted) == count_flops(config, trainable_fraction=0, adapter_params=2 * 4 * (16 + 16))


def test_counting_is_the_same_while_zero_3_shards_what_transformers_builds():
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    config = LlamaConfig(**TINY)
    before = count_flops(config)
    switch = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert is_deepspeed_zero3_enabled()
    assert count_flops(config) == before
    del switch


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", 756.4e12), ("NVIDIA H200", 989.4e12),
        ("NVIDIA B200", 2.25e15), ("NVIDIA L40S", 362.05e12), ("NVIDIA GeForce RTX 4090", 165.2e12), ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12), ("NVIDIA L4", 121e12), ("Tesla V100-SXM2-16GB", 125e12), ("Tesla V100-PCIE-16GB", 112e12),
        ("NVIDIA RTX 6000 Ada Generation", 364.2e12), ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None), ("NVIDIA RTX A1000", None),
        ("NVIDIA T400", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)  # fmt: skip
def test_a_card_is_known_by_its_whole_name(name, peak):
    assert peak_flops(name) == peak


# ---- progress


def state(step, max_steps=2000):
    return SimpleNamespace(global_step=step, max_steps=max_steps)


def test_plain_lines_are_exact():
    clock, stream = Clock(), io.StringIO()
    progress = ProgressCallback(True, stream=stream, clock=clock)
    progress.on_train_begin(None, state(100), None)
    clock.now = 60.0  # the first step compiles; the pace is that of the 19 after it
    progress.on_step_end(None, state(101), None)
    clock.now = 60.0 + 19 * 0.4
    progress.on_step_end(None, state(120), None)
    logs = {"loss": 1.2341, "learning_rate": 2e-4, "grad_norm": 0.9123, "speed/tokens_per_s": 18204.2}
    progress.on_log(None, state(120), None, logs=logs)
    progress.on_log(None, state(120), None, logs={"eval_loss": 1.3, "eval_runtime": 4.21})
    progress.on_log(None, state(2000), None, logs={"train_runtime": 3725.0, "train_loss": 1.1})
    assert stream.getvalue() == (
        "step 120/2000  loss 1.234  lr 2.0e-4  grad 0.91  18,204 tok/s  eta 0:12:32\n"
        "step 120/2000  eval loss 1.300  in 4.2 s\n"
        "step 2000/2000  done  in 1:02:05\n"
    )


def test_other_ranks_say_nothing():
    stream = io.StringIO()
    progress = ProgressCallback(False, stream=stream, interactive=True)
    progress.on_train_begin(None, state(0), None)
    progress.on_log(None, state(1), None, logs={"loss": 1.0})
    progress.on_train_end(None, state(1), None)
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_that_shows_the_evaluation_in_its_own_line_and_gives_the_cursor_back():
    stream = io.StringIO()
    progress = ProgressCallback(True, stream=stream, interactive=True)
    progress.on_train_begin(None, state(0, 10), None)
    progress.on_step_end(None, state(1, 10), None)
    progress.on_log(None, state(1, 10), None, logs={"loss": 1.0, "speed/tokens_per_s": 10.0})
    progress.on_prediction_step(None, state(1, 10), None, eval_dataloader=[1, 2, 3])
    assert [task.visible for task in progress._progress.tasks] == [False, True]
    progress.on_log(None, state(1, 10), None, logs={"eval_loss": 2.0})
    progress.on_evaluate(None, state(1, 10), None)
    assert [task.visible for task in progress._progress.tasks] == [True, False]
    progress.on_step_end(None, state(2, 10), None)
    progress.on_train_end(None, state(2, 10), None)
    text = stream.getvalue()
    assert "step 1/10  eval loss 2.000" in text and "loss 1.000  10 tok/s  eta" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # show comes after hide


def test_durations_and_small_numbers_read_well():
    assert [format_duration(seconds) for seconds in (0, 59.6, 753, 90061)] == ["0:00:00", "0:01:00", "0:12:33", "25:01:01"]
    assert [format_small(value) for value in (2e-4, 0.0, 1.0, 1e-10)] == ["2.0e-4", "0.0e0", "1.0e0", "1.0e-10"]


# ---- with the real trainer


class CountingTrainer(Trainer):
    throughput: Throughput

    def get_batch_samples(self, epoch_iterator, *args):
        return super().get_batch_samples(self.throughput.watch(epoch_iterator), *args)

    def training_step(self, model, inputs, *args):
        self.throughput.count(inputs)
        return super().training_step(model, inputs, *args)


def test_a_training_writes_speed_on_every_training_line_and_a_picture_can_be_drawn(tmp_path):
    rows = [{"input_ids": torch.arange(8) + row, "labels": torch.arange(8) + row} for row in range(12)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=2,
        eval_strategy="steps", eval_steps=3, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    tracking, throughput, stream = TrackingCallback(tmp_path, section(mode="disabled"), {}, is_main=True), Throughput(), io.StringIO()
    trainer = CountingTrainer(
        AutoModelForCausalLM.from_config(LlamaConfig(**TINY)),
        arguments,
        train_dataset=rows,
        eval_dataset=rows[:4],
        callbacks=[throughput, tracking, ProgressCallback(True, stream=stream)],
    )
    trainer.remove_callback(PrinterCallback)  # transformers' own, which would print every line a second time
    trainer.throughput = throughput
    trainer.train()
    tracking.finish(0)
    lines = read_metrics(tmp_path)
    training = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in training] == [2, 4, 6]
    for line in training:
        assert line["speed/tokens_per_s"] == pytest.approx(8 * line["speed/samples_per_s"])  # all rows have 8 tokens
        assert line["speed/samples_per_s"] * line["speed/step_s"] == pytest.approx(4)  # 2 rows x 2 micro-batches
        assert 0 <= line["speed/data_wait_fraction"] < 1 and line["memory/peak_gib"] > 0.05
        assert "speed/mfu" not in line  # what a CPU could do is not known
    assert [line["step"] for line in lines if "eval/loss" in line] == [3, 6]
    assert loss_curve(lines, "train/loss")[0] == [2, 4, 6]
    assert "run/runtime_s" in lines[-1]
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == [f"step {step}/6" for step in (2, 3, 4, 6, 6, 6)]
    picture = plot_losses(tmp_path, tmp_path / "figures" / "loss.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_step_that_was_trained_twice_counts_as_it_went_the_last_time():
    lines = [{"step": step, "train/loss": loss} for step, loss in ((1, 4.0), (2, 3.0), (3, 9.0), (2, 3.0), (3, 2.0), (4, None))]
    assert loss_curve(lines, "train/loss") == ([1, 2, 3], [4.0, 3.0, 2.0])


def test_smoothing_neither_lags_behind_a_falling_curve_nor_bends_its_ends():
    line = [10.0 - 0.1 * step for step in range(80)]
    assert smooth(line) == pytest.approx(line)
    assert max(smooth([0.0, 1.0] * 50)[10:-10]) < 0.7


def test_reading_metrics_needs_no_torch():
    program = "import sys, harness.tracking; assert not {'torch', 'transformers', 'wandb', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
