"""Recipes that are right: what YAML and overrides mean, that every shipped file loads, and that every key is explained."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from harness.errors import RecipeError
from harness.overrides import dashed_overrides
from harness.recipe import Recipe, load, recipe_digest, render_recipe
from harness.recipe.backend import AccelerateDeepSpeed, AccelerateFsdp, load_backend
from harness.recipe.load import NO_RECIPES, difference_from_defaults, read_yaml, render_value
from harness.recipe.names import ELSEWHERE
from harness.recipe.schema import Section
from harness.resources import find_config, shipped, shipped_names

REFERENCE = ("sft/", "distill/", "dpo/", "kto/", "reward/", "rlhf/")
RECIPES = [name for name in shipped_names("") if not name.startswith(NO_RECIPES)]
BACKENDS = shipped_names("backends")


@pytest.fixture
def base(tmp_path) -> Path:
    file = tmp_path / "base.yaml"
    file.write_text("model: {name_or_path: some/model}\ndata: {train: rows.jsonl}\n")
    return file


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "written.yaml"
    file.write_text(text)
    return file


# ---- YAML and overrides


@pytest.mark.parametrize(
    "text, value",
    [
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("5e-5", 5e-5),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("'8'", "8"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
    ],
)
def test_scalars_mean_what_yaml_1_2_says(tmp_path, text, value):
    read = read_yaml(written(tmp_path, f"key: {text}\n"))["key"]
    assert (read, type(read)) == (value, type(value))


def test_a_word_that_looks_like_a_number_survives_being_written(base, tmp_path):
    """A commit such as 7e12345 is text; unquoted in the run folder's recipe it would come back as infinity."""
    recipe = load(base, ["model.revision='7e12345'", "tracking.project='0o17'", "tracking.name='no'", "tracking.tags=['1_0', '010', '~']"])
    assert load(written(tmp_path, render_recipe(recipe))) == recipe


def test_three_spellings_of_an_override_mean_the_same(base):
    spellings = (
        ["train.seed=7", "train.eval_strategy=no"],
        ["--train.seed=7", "--train.eval_strategy=no"],
        ["--train.seed", "7", "--train.eval_strategy", "no"],
    )
    recipes = [load(base, dashed_overrides(spelling)) for spelling in spellings]
    assert recipes[0] == recipes[1] == recipes[2]
    assert (recipes[0].train.seed, recipes[0].train.eval_strategy) == (7, "no")


def test_the_command_and_the_rank_program_take_the_same_overrides(base):
    from harness.rank import parse_arguments  # imports what launches ranks; here, so that the other tests start at once

    options = parse_arguments(
        ["--train.seed", "7", "--recipe", str(base), "model.dtype=float32", "--smoke", "--train.weight_decay", "0.1", "--local_rank=1"]
    )
    assert dashed_overrides(options.overrides) == ["train.seed=7", "model.dtype=float32", "train.weight_decay=0.1"]
    assert (options.smoke, options.fresh, options.recipe) == (True, False, str(base))


def test_an_override_makes_sections_reaches_into_lists_and_the_last_one_wins(base):
    recipe = load(
        base,
        [
            "model.lora.r=8",
            "data.train=[{path: a}, {path: b}]",
            "data.train.1.weight=2",
            "train.seed=1",
            "train.seed=2",
            "model.lora.dropout=0",
        ],
    )
    assert (recipe.model.lora.r, recipe.model.lora.dropout) == (8, 0.0)
    assert [(source.path, source.weight) for source in recipe.data.train] == [("a", 1.0), ("b", 2.0)]
    assert recipe.train.seed == 2
    assert load(base, ["data.train=odd: name: x.jsonl"]).data.train[0].path == "odd: name: x.jsonl"


def test_one_source_may_be_a_path_or_a_mapping(base):
    assert (
        load(base, ["data.train={path: a.jsonl}"]).data.train
        == load(base, ["data.train=a.jsonl"]).data.train
        == load(base, ["data.train=[{path: a.jsonl}]"]).data.train
    )


def test_a_recipe_cannot_be_written_to(base):
    from pydantic import ValidationError

    recipe = load(base)
    with pytest.raises(ValidationError):
        recipe.train.seed = 3


def test_the_digest_is_of_what_is_trained_and_not_of_where_it_is_written(base):
    digest = recipe_digest(load(base))
    assert recipe_digest(load(base, ["output_dir=elsewhere", "tracking.project=x"])) == digest
    assert recipe_digest(load(base, ["train.seed=43"])) != digest


def test_the_difference_is_what_an_empty_recipe_would_not_have(base):
    recipe = load(base, ["train.seed=42", "train.learning_rate=1e-4", "model.lora={}", "data.train=[{path: a, weight: 2}]"])
    assert difference_from_defaults(recipe) == {
        "model.name_or_path": "some/model",
        "model.lora": {},
        "data.train": [{"path": "a", "weight": 2.0}],
        "train.learning_rate": 1e-4,
        "output_dir": "runs/base",
    }
    assert [render_value(value) for value in ("7e12", 1e-5, [], {"a": None})] == ["'7e12'", "1.0e-05", "[]", "{a: null}"]


# ---- shipped files


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_loads_by_name_and_by_path_and_comes_back_from_its_own_text(name, tmp_path):
    recipe = load(name)
    assert load(shipped("configs", f"{name}.yaml")) == load(f"configs/{name}.yaml") == recipe
    assert load(written(tmp_path, render_recipe(recipe))) == recipe
    assert recipe.output_dir == read_yaml(shipped("configs", f"{name}.yaml")).get("output_dir", f"runs/{name.replace('/', '-')}")


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith(REFERENCE)])
def test_a_reference_recipe_says_its_hardware_its_command_and_whether_it_has_been_run(name):
    header = [line for line in shipped("configs", f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    for heading in ("# Hardware: ", "# Data: ", "# Expect, ", "# Run so far: "):
        assert sum(line.startswith(heading) for line in header) == 1, heading
    verb = "generate" if load(name).task == "generate" else "run"
    assert any(f"harness {verb} {name}" in line for line in header)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith(REFERENCE)])
def test_the_ranks_that_a_reference_recipe_names_can_make_its_batch(name):
    from harness.launcher import accumulation_steps

    recipe = load(name)
    backend = load_backend(recipe.backend)
    for world_size in (1,) if recipe.train.global_batch_size is None else {"single": (1, 2, 4, 8)}.get(backend.kind, (4, 8, 16)):
        assert accumulation_steps(recipe, world_size) >= 1


def test_the_reference_recipe_is_the_well_known_script():
    recipe = load("sft/llama3-8b-tools-qlora")
    assert recipe.model.name_or_path == "meta-llama/Meta-Llama-3-8B-Instruct"
    quantization, lora, train = recipe.model.quantization, recipe.model.lora, recipe.train
    assert (quantization.load_in_4bit, quantization.bnb_4bit_quant_type, quantization.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert (lora.r, lora.alpha, lora.dropout, lora.target_modules) == (16, 32, 0.05, ("q_proj", "k_proj", "v_proj", "o_proj"))
    assert (train.num_train_epochs, train.per_device_train_batch_size, train.learning_rate, train.warmup_steps) == (3, 4, 2e-4, 100)


def test_a_name_means_a_path_first_then_a_neighbour_then_a_shipped_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("zero2", "backends") == find_config("backends/zero2") == find_config("configs/backends/zero2.yaml", "backends")
    (tmp_path / "zero2").write_text("")
    assert find_config("zero2", "backends") == Path("zero2")
    assert find_config("nope", "backends") is None
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "mine.yaml").write_text("")
    assert find_config("mine.yaml", base_dir=tmp_path / "deep") == tmp_path / "deep" / "mine.yaml"


def test_what_a_shipped_backend_does_is_in_its_name():
    facts = {name: (load_backend(name).kind, load_backend(name).zero_stage, load_backend(name).offloads) for name in BACKENDS}
    assert facts == {
        "single": ("single", 0, False),
        "ddp": ("ddp", 0, False),
        "zero1": ("deepspeed", 1, False),
        "zero2": ("deepspeed", 2, False),
        "zero3": ("deepspeed", 3, False),
        "zero3-offload": ("deepspeed", 3, True),
        "fsdp2": ("fsdp", 0, False),
    }


def test_the_llama_3_template_shows_tools_calls_and_results_and_trains_only_what_the_assistant_says():
    from transformers.utils.chat_template_utils import render_jinja_template

    template = shipped("configs", "templates", "llama3-tools.jinja").read_text()
    tool = {
        "type": "function",
        "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
    calls = [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}} for city in ("Köln", "Paris")]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Köln and Paris?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "21 degrees"},
        {"role": "assistant", "content": "Both 21 degrees."},
    ]
    (text,), (spans,) = render_jinja_template(
        [messages], tools=[tool], chat_template=template, return_assistant_tokens_mask=True, bos_token="<BOS>"
    )
    assert [text[start:end] for start, end in spans] == [
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Köln"}}</tool_call>\n'
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call><|eot_id|>',
        "Both 21 degrees.<|eot_id|>",
    ]
    head, system, user, *_, last = text.split("<|start_header_id|>")
    assert (head, user) == ("<BOS>", "user<|end_header_id|>\n\nWeather in Köln and Paris?<|eot_id|>")
    assert system.startswith('system<|end_header_id|>\n\nBe brief.\n\nYou can call these functions:\n{"name": "get_weather", ')
    assert "<|start_header_id|>tool<|end_header_id|>\n\n21 degrees<|eot_id|>" in text
    (prompt,), _ = render_jinja_template([messages[1:2]], chat_template=template, add_generation_prompt=True, bos_token="<BOS>")
    assert prompt.endswith("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert "system" not in prompt


# ---- the schema, against itself


def sections(schema: type[BaseModel] = Recipe) -> list[type[BaseModel]]:
    found, waiting = [], [schema, AccelerateDeepSpeed, AccelerateFsdp]
    while waiting:
        section = waiting.pop()
        if section not in found:
            found.append(section)
            waiting += [
                kind for kind in Section.__subclasses__() if kind.__name__ in str([f.annotation for f in section.model_fields.values()])
            ]
    return found


# Names that transformers, PEFT, Accelerate or W&B have documented for years and that mean here exactly what they mean there.
SELF_EXPLANATORY = set(
    """
    task model data train checkpoint guard watchdog tracking quantization lora trust_remote_code path format max_rows dropout
    use_rslora use_dora
    bnb_4bit_quant_type learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim weight_decay adam_beta1 adam_beta2
    adam_epsilon fp16 tf32 gradient_checkpointing_kwargs torch_compile neftune_noise_alpha logging_steps eval_steps eval_on_start
    early_stopping_threshold dataloader_num_workers full_determinism project entity group tags r
    num_cycles min_lr min_lr_rate num_decay_steps num_stable_steps min_lr_ratio power lr_end
    """.split()
)


def test_every_field_is_explained_below_it_or_known_by_name():
    for section in sections():
        if section in (AccelerateDeepSpeed, AccelerateFsdp):
            continue  # Accelerate's own names
        unexplained = {name for name, field in section.model_fields.items() if not field.description} - SELF_EXPLANATORY
        assert unexplained == set(), section.__name__


def test_every_name_from_elsewhere_leads_to_a_key_that_exists():
    for foreign, ours in ELSEWHERE.items():
        for dotted in {re.match(r"[\w.]+", ours).group(), *re.findall(r"[a-z]+\.[\w.]+", ours)}:
            section: type[BaseModel] | None = Recipe
            for part in dotted.split("."):
                assert section is not None and part in section.model_fields, (foreign, ours)
                annotation = str(section.model_fields[part].annotation)
                section = next((kind for kind in Section.__subclasses__() if re.search(rf"\b{kind.__name__}\b", annotation)), None)


def test_no_name_from_elsewhere_is_one_of_ours_in_the_place_where_it_is_sent():
    for foreign, ours in ELSEWHERE.items():
        assert foreign != re.match(r"[\w.]+", ours).group()


def test_an_unreadable_file_is_no_traceback(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe"):
        load(tmp_path / "nowhere.yaml")
    assert yaml.safe_load(render_recipe(load("tiny/sft-full")))["task"] == "sft"
