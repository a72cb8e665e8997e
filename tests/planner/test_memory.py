"""Memory of a GPU against hand computations (8B and 70B; full, LoRA, QLoRA; every ZeRO stage), and what must always hold of a plan."""

import dataclasses
import json
import math

import pytest
import torch

from harness.errors import ModelError, RecipeError
from harness.planner.architecture import load_architecture
from harness.planner.gpus import GIB, parse_gpu
from harness.planner.hours import measured_speed, plan_hours, plan_work
from harness.planner.memory import plan_memory
from harness.planner.plan import Place, build_setting, plan_recipe
from harness.planner.render import render_plan, to_json
from harness.planner.setting import Range, Setting
from harness.planner.states import Parameters, constant_bytes, count_parameters, plan_states
from harness.recipe import load
from harness.recipe.backend import load_backend

LLAMA_8B, LLAMA_70B = 8_030_261_248, 70_553_706_496


def setting(recipe: str, *overrides: str, gpus: int = 1, nodes: int = 1) -> Setting:
    return build_setting(load(recipe, list(overrides)), Place(gpus, nodes))


def at_rest(of: Setting) -> float:
    """Weights, gradients, optimiser; what is always there, and the gradients of a step."""
    states = plan_states(of)
    names = ("weights", "4-bit constants", "adapter", "optimiser", "gradients")
    return sum(states.always[name].expected for name in names if name in states.always) + states.gradients.expected


FULL = "sft/llama3.1-8b-tools-full-zero3"


@pytest.mark.parametrize(
    ("backend", "gpus", "bytes_per_weight"),
    [
        # DeepSpeed in bfloat16: 2 weight; 2 gradient; 4 master and 8 moments.
        ("zero1", 8, 2 + 2 + 12 / 8),  # 8 micro-batches accumulate: gradients whole
        ("zero2", 8, 2 + 2 / 8 + 12 / 8),
        ("zero3", 8, (2 + 2 + 12) / 8),
        ("zero3", 4, (2 + 2 + 12) / 4),
        # Without DeepSpeed in float32: 4, 4 and 8.
        ("fsdp2", 8, (4 + 4 + 8) / 8),
        ("ddp", 8, 4 + 4 + 8),
        ("single", 1, 4 + 4 + 8),
    ],
)
def test_full_fine_tuning_of_8b_by_hand(backend, gpus, bytes_per_weight):
    dtype = "auto" if backend in ("single", "ddp", "fsdp2") else "bfloat16"
    of = setting(FULL, f"backend={backend}", f"model.dtype={dtype}", gpus=gpus)
    assert at_rest(of) == pytest.approx(LLAMA_8B * bytes_per_weight, rel=1e-9)


def test_full_fine_tuning_of_70b_by_hand_is_16_bytes_a_weight_over_all_ranks():
    of = setting(FULL, "model.name_or_path=meta-llama/Llama-3.3-70B-Instruct", gpus=8, nodes=8)
    assert at_rest(of) == pytest.approx(LLAMA_70B * 16 / 64, rel=1e-9)
    # 64 GPUs of 80 GB hold it (16.4 GiB and activations), 8 do not: 131 GiB each.
    assert plan_memory(of).peak.high < 60 * GIB
    eight = setting(FULL, "model.name_or_path=meta-llama/Llama-3.3-70B-Instruct", gpus=8)
    assert plan_memory(eight).peak.low > LLAMA_70B * 16 / 8 > parse_gpu("h100").bytes


def test_lora_of_8b_by_hand():
    # r 16 on all seven layers: 32 x 16 x (2 x (4096 + 4096) + 2 x (4096 + 1024) + 3 x (4096 + 14336)).
    adapter = 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert adapter == 41_943_040
    lora = ("model.name_or_path=meta-llama/Llama-3.1-8B-Instruct", "train.global_batch_size=null")
    single = setting("sft/qwen2.5-7b-tools-lora", *lora)
    # The frozen base in bfloat16; adapter, gradient and two moments in float32.
    assert at_rest(single) == LLAMA_8B * 2 + adapter * (4 + 4 + 8)
    zero2 = setting("sft/qwen2.5-7b-tools-lora", *lora, "backend=zero2", gpus=4)
    # DeepSpeed casts the adapter too, and keeps masters.
    assert at_rest(zero2) == pytest.approx((LLAMA_8B + adapter) * 2 + adapter * (2 + 12) / 4, rel=1e-9)


def test_qlora_of_8b_on_one_gpu_and_of_70b_under_zero3_by_hand():
    linears_8b = 32 * 218_103_808
    rest_8b = LLAMA_8B - linears_8b
    adapter = 32 * 16 * (2 * 8192 + 2 * 5120)  # q, k, v, o
    constants = linears_8b * (1 / 64 + 4 / 64 / 256)
    by_hand = linears_8b / 2 + constants + rest_8b * 4 + adapter * 16
    assert at_rest(setting("sft/llama3-8b-tools-qlora")) == pytest.approx(by_hand, rel=1e-4)

    of = setting("sft/llama3.3-70b-tools-qlora", gpus=8, nodes=2)
    states, loading = plan_states(of), plan_memory(of).moments["loading"]
    linears, rest = 68_451_041_280, LLAMA_70B - 68_451_041_280
    assert states.always["weights"].expected == pytest.approx((linears / 2 + rest * 2) / 16, rel=1e-9)
    assert states.always["4-bit constants"].expected == pytest.approx(linears * (1 / 64 + 4 / 64 / 256), rel=1e-3)
    # 4-bit weights are quantised before they are cut: all of them on every GPU.
    assert loading["weights"].expected == pytest.approx(linears / 2 + rest * 2, rel=1e-9)
    assert plan_memory(of).deciding == "loading"


@pytest.mark.parametrize("double", [True, False])
def test_the_constants_of_4_bits_are_those_that_bitsandbytes_keeps(double):
    from bitsandbytes.functional import quantize_4bit

    rows, columns = 256, 1024
    _, state = quantize_4bit(torch.randn(rows, columns), blocksize=64, compress_statistics=double, quant_type="nf4")
    kept = [state.absmax, state.code] + ([state.offset, state.state2.absmax, state.state2.code] if double else [])
    recipe = load("sft/llama3-8b-tools-qlora", [f"model.quantization.bnb_4bit_use_double_quant={str(double).lower()}"])
    counts = Parameters(0, 0, rows * columns, 0, matrices_4bit=1)
    assert constant_bytes(counts, recipe.model.quantization) == sum(tensor.nbytes for tensor in kept)


def test_the_teacher_and_the_reference_are_whole_unless_zero3_shards_them():
    teacher = 8_190_735_360 * 2
    of = setting("distill/qwen3-8b-to-1.7b-on-policy", gpus=8)
    assert plan_states(of).always["teacher"].expected == teacher
    sharded = setting("distill/llama3.1-8b-to-1b-resident", gpus=4)
    assert plan_states(sharded).always["teacher"].expected == LLAMA_8B * 2 / 4
    dpo = (
        "task=dpo",
        "dpo.reference=resident",
        "backend=zero2",
    )
    assert plan_states(setting(FULL, *dpo, gpus=8)).always["reference"].expected == LLAMA_8B * 2
    assert "reference" not in plan_states(setting(FULL, *dpo, "dpo.reference=cached", gpus=8)).always


def test_pairs_are_two_rows_and_a_reward_model_has_no_head():
    sft = setting("sft/qwen2.5-7b-tools-lora")
    no_sft = ("model.lora.dropout=0.0", "train.metric_for_best_model=null")
    dpo = setting("sft/qwen2.5-7b-tools-lora", "task=dpo", *no_sft)
    assert dpo.tokens.expected == 2 * sft.tokens.expected
    reward = setting("sft/qwen2.5-7b-tools-lora", "task=reward", *no_sft)
    assert reward.shape.parameters == sft.shape.parameters - sft.shape.embedding + sft.shape.hidden
    assert plan_memory(reward).total("loss").expected < plan_memory(dpo).total("loss").expected


def test_the_cache_of_generation_by_hand():
    of = setting("distill/llama3.3-70b-answers")
    # 80 layers, keys and values, 8 heads of 128, 2 bytes, 16 rows of 3072 tokens, of which 512 are written.
    writes = plan_memory(of).moments["writing"]
    assert writes["generation cache"].expected == 80 * 2 * 8 * 128 * 2 * 16 * 3072
    assert writes["prompts as they are read"].expected == 16 * 2560 * (3 * 28672 + 2 * 8192) * 2


RLOO = "rlhf/qwen2.5-7b-tools-rloo"
QWEN_7B = 7_615_616_512


def test_all_answers_of_a_ranks_step_are_written_at_once_by_hand():
    # 256 answers a step. 28 layers, keys and values of 4 heads of 128, MLPs 18944 wide of a stream of 3584, 152064 tokens; bfloat16.
    for gpus, answers in ((8, 32), (1, 256)):
        writes = plan_memory(setting(RLOO, gpus=gpus)).moments["writing"]
        assert writes["generation cache"].expected == 28 * 2 * 4 * 128 * 2 * answers * 2304
        assert writes["prompts as they are read"].expected == answers * (2304 - 256) * (3 * 18944 + 2 * 3584) * 2
        assert writes["logits of one token"].expected == answers * 152064 * 4 * 4
        assert "reference" not in writes
    assert plan_memory(setting(RLOO, gpus=1)).deciding == "writing"


def test_vllm_takes_its_share_in_the_place_of_the_cache_and_a_server_takes_nothing():
    full = ["model.lora=null", "rlhf.use_vllm=true", "rlhf.vllm_gpu_memory_utilization=0.25"]
    of = build_setting(load(RLOO, full), Place(8, 1, parse_gpu("80GiB")))
    writes = plan_memory(of).moments["writing"]
    assert writes["vLLM"].expected == 0.25 * 80 * GIB and "generation cache" not in writes
    server = ["model.lora=null", "rlhf.use_vllm=true", "rlhf.vllm_mode=server", "rlhf.vllm_server_base_url=http://h:1"]
    writes = plan_memory(build_setting(load(RLOO, server), Place(8, 1, parse_gpu("80GiB")))).moments["writing"]
    assert "vLLM" not in writes and "generation cache" not in writes


@pytest.mark.parametrize(("overrides", "has"), [((), True), (("rlhf.beta=0",), False), (("rlhf.algorithm=grpo", "rlhf.beta=null"), False)])
def test_reinforcement_of_all_weights_has_a_reference_unless_moving_away_costs_nothing(overrides, has):
    of = setting(RLOO, "model.lora=null", *overrides, gpus=8)
    assert plan_states(of).always.get("reference", Range.exact(0)).expected == has * QWEN_7B * 2
    zero3 = setting(RLOO, "model.lora=null", "backend=zero3", *overrides, gpus=8)
    assert plan_states(zero3).always.get("reference", Range.exact(0)).expected == has * QWEN_7B * 2 / 8


def test_an_adapter_that_goes_on_carries_a_copy_and_reward_models_stand_beside_by_their_files(tmp_path):
    earlier, judge = tmp_path / "earlier", tmp_path / "judge"
    (judge / "final").mkdir(parents=True)
    earlier.mkdir()
    (earlier / "adapter_config.json").write_text(json.dumps({"r": 16, "target_modules": ["q_proj", "v_proj"]}))
    (judge / "final" / "model.safetensors").write_bytes(b"\0" * 1000)
    goes_on = ["model.lora=null", f"model.adapter={earlier}"]
    rewards = f"rlhf.rewards=[{{type: tool_calls}}, {{type: reward_model, model: {judge}}}, {{type: reward_model, model: runs/nothing}}]"
    always = plan_states(setting(RLOO, *goes_on, rewards)).always
    # 28 layers, r 16, float32: q is 3584 x 3584, v 3584 x 512.
    assert always["reference's adapter"].expected == always["adapter"].expected == 28 * 16 * (2 * 3584 + 3584 + 512) * 4
    assert always["reward models"].expected == 1000
    assert plan_states(setting(RLOO, *goes_on, "rlhf.beta=0")).always["reference's adapter"].expected == 0
    plan = plan_recipe(load(RLOO, [rewards]), Place(8))
    assert plan.not_counted == ["runs/nothing"] == to_json(plan, [])["not_counted"]
    assert "not counted: the reward model runs/nothing" in render_plan(plan, [])


RECIPES = [("sft/llama3-8b-tools-qlora", 1), (FULL, 8), ("sft/llama3.1-8b-tools-full-fsdp2", 8), ("distill/qwen3-8b-to-1.7b-on-policy", 8)]


@pytest.mark.parametrize(("recipe", "gpus"), RECIPES)
def test_low_is_below_expected_and_expected_below_high_in_every_component(recipe, gpus):
    memory = plan_memory(setting(recipe, gpus=gpus))
    for components in memory.moments.values():
        for size in components.values():
            assert 0 <= size.low <= size.expected <= size.high and math.isfinite(size.high)


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ("train.gradient_checkpointing=false", "train.gradient_checkpointing=true"),
        ("train.per_device_train_batch_size=4", "train.per_device_train_batch_size=2"),
        ("data.max_length=8192", "data.max_length=2048"),
        ("backend=zero2", "backend=zero3"),
        ("train.optim=adamw_torch", "train.optim=adamw_8bit"),
        ("model.lora=null", "model.lora={r: 8, alpha: 16}"),
    ],
)
def test_what_people_do_against_a_full_card_makes_the_plan_smaller(more, less):
    def peak(override):
        return plan_memory(setting(FULL, override, gpus=8)).peak

    assert all(getattr(peak(more), name) > getattr(peak(less), name) for name in ("low", "expected", "high"))


def test_zero_1_keeps_whole_gradients_only_while_micro_batches_accumulate():
    once = setting(FULL, "backend=zero1", "train.global_batch_size=16", gpus=8)
    assert plan_states(once).gradients.expected == LLAMA_8B * 2 / 8
    twice = setting(FULL, "backend=zero1", "train.global_batch_size=32", gpus=8)
    assert plan_states(twice).gradients.expected == LLAMA_8B * 2


def test_the_operations_of_a_run_by_hand_and_its_hours_by_a_stated_throughput():
    of = setting("sft/qwen2.5-7b-tools-lora", "train.max_steps=100", "train.num_train_epochs=null", gpus=8)
    of = dataclasses.replace(of, backend=load_backend("ddp"))
    layers = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    adapter = 28 * 16 * (2 * 7168 + 2 * 4096 + 3 * 22528)
    # Frozen: forward and the gradient of the input; the adapter besides its own gradient; attention to half of 2048 tokens.
    per_token = 4 * (layers + 152064 * 3584) + 6 * adapter + 12 * 28 * 28 * 128 * 2049 / 2
    work = plan_work(of, None)
    assert work.flops_per_token == pytest.approx(per_token, rel=1e-12)
    assert (work.steps, work.tokens) == (100, 100 * 16 * 2048)
    hours = plan_hours(work, 8, 10_000.0, None)
    assert hours.hours == pytest.approx(100 * 16 * 2048 / 10_000 / 3600) and hours.gpu_hours == 8 * hours.hours
    assert plan_hours(work, 8, None, None) is None
    assert plan_hours(plan_work(setting("sft/qwen2.5-7b-tools-lora"), None), 1, 10_000.0, None) is None


def test_hours_are_by_a_runs_own_speed_without_its_first_line(tmp_path):
    lines = [{"step": 1, "speed/tokens_per_s": 1.0}, {"step": 2, "speed/tokens_per_s": 500.0}, {"step": 3, "eval/loss": 1.0}]
    # The first of them as a life that was killed while it wrote leaves it.
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "spe\n' + "\n".join(map(json.dumps, lines)))
    assert measured_speed(tmp_path) == 500
    with pytest.raises(RecipeError, match=r"measured = .*nowhere: .* cannot be read .*; train that run first"):
        measured_speed(tmp_path / "nowhere")


def test_offloaded_states_are_not_on_the_gpu():
    of = setting(FULL, "backend=zero3-offload", gpus=8)
    assert at_rest(of) == 0
    assert plan_memory(of).peak.expected > 2 * GIB


def test_ranks_that_cannot_make_the_global_batch_are_refused():
    with pytest.raises(RecipeError, match=r"global_batch_size = 64; 5 ranks .* take 10 rows at once, which does not divide it"):
        plan_work(setting(FULL, gpus=5), None)


def test_a_deepspeed_json_says_its_own_sizes(tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}')
    (tmp_path / "mine.yaml").write_text(
        f"distributed_type: DEEPSPEED\ndeepspeed_config: {{deepspeed_config_file: {tmp_path / 'ds.json'}}}\n"
    )
    ours, shipped = (setting(FULL, f"backend={backend}", gpus=8) for backend in (tmp_path / "mine.yaml", "zero2"))
    buckets = [plan_states(of).in_backward["communication buffers"].expected for of in (ours, shipped)]
    # An embedding of 525 million weights is larger than DeepSpeed's default bucket, and travels beside it.
    assert buckets == [1000 * 2 + 128256 * 4096 * 2, 500_000_000 * 2 + 128256 * 4096 * 2]
    assert load_backend("zero2").zero == {} and count_parameters(load_architecture("Qwen/Qwen3-8B"), load(FULL)).trained == 8_190_735_360


def test_ranges_add_up_by_their_ends():
    assert Range(1, 2, 3) + Range.exact(1) == Range(2, 3, 4)
    assert Range(1, 5, 6).at_least(Range(2, 3, 7)) == Range(2, 5, 7)


def test_an_earlier_adapter_is_planned_as_its_own_config_says(tmp_path):
    config = {"r": 8, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 16}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = "sft/llama3.1-8b-tools-full-zero3"
    begin = (f"model.adapter={tmp_path}", "backend=single", "train.global_batch_size=null")
    further = setting(base, *begin)
    adapter = 32 * 8 * ((4096 + 4096) + (4096 + 1024))
    assert count_parameters(further.shape, further.recipe).trained == adapter
    assert at_rest(further) == LLAMA_8B * 2 + adapter * 16
    stacked = setting(base, *begin, "model.adapter_mode=stack", "model.lora={r: 16, alpha: 32}")
    beneath = plan_states(stacked).always["adapter beneath"].expected
    assert beneath == adapter * 4 and count_parameters(stacked.shape, stacked.recipe).trained == 41_943_040
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"model.adapter = .*; there is no adapter_config.json in it"):
        plan_states(further)
