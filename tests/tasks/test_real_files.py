"""Every real file that holds rows to train is read by a recipe as it lies there, and a model takes a step on it."""

import json
import re

import pytest
from conftest import MICRO_TEMPLATE, SHARED, STORIES, metrics, needs_shared
from faults.rig import shared_rig

# file -> rows that it holds, and rows that are left when what cannot be trained is skipped (why: tests/data/test_layouts.py).
FILES = {
    "apibank/apibank_l1.json": (399, 399),
    "apibank/apibank_l2.json": (127, 121),  # 6 call tools that they do not offer
    "apibench/api/huggingface_api.jsonl": (936, 936),
    "apibench/api/tensorflowhub_api.jsonl": (696, 696),
    "apibench/api/torchhub_api.jsonl": (94, 94),
    "apibench/huggingface_eval.json": (911, 911),
    "apibench/tensorflow_eval.json": (688, 688),
    "apibench/torchhub_eval.json": (186, 186),
    "apibench/torchhub_train.json": (837, 837),
    "bfcl/BFCL_v4_multiple.json": (200, 200),
    "bfcl/BFCL_v4_parallel.json": (200, 200),
    "bfcl/BFCL_v4_parallel_multiple.json": (200, 200),
    "bfcl/BFCL_v4_simple_python.json": (400, 400),
    "formats/glaive_sample.jsonl": (3, 3),
    "formats/hermes_reasoning_sample.jsonl": (1, 1),
    "formats/hermes_v1_sample.jsonl": (2, 2),
    "formats/toolace_sample.jsonl": (3, 3),
    "glaive/glaive_toolcall_en_demo.json": (300, 300),
    "glaive/reason_tool_use_demo_50.jsonl": (50, 50),
    "sealtools/dev.jsonl": (700, 672),  # the rest calls with the result of another call
    "sealtools/test_in_domain.jsonl": (700, 670),
    "structured_outputs/example_rollouts.jsonl": (5, 1),  # the rest has no full reward
    "toolpref/ask_first_v1.0.jsonl": (100, 50),  # half is labelled bad; calls to tools that no row offers go too
    "toolpref/error_recovery_v1.5.jsonl": (592, 196),
    "toolpref/strategic_tool_selection_v1.5.jsonl": (534, 123),
    "toolpref/verification_before_action_v1.5.jsonl": (628, 281),
    "when2call/when2call_test_llm_judge.jsonl": (300, 300),
    "xlam/example.jsonl": (5, 5),
    "xlam/example_rollouts.jsonl": (5, 3),
    "xlam/masking_sft_data_example.json": (10, 8),  # two answer that no tool fits, without words
    "xlam/sealtool.json": (294, 294),
}
NOT_TRAINED = {
    "apibench/questions/questions_huggingface_0_shot.jsonl": "holds no answer",
    "apibench/questions/questions_tensorflowhub_0_shot.jsonl": "holds no answer",
    "apibench/questions/questions_torchhub_0_shot.jsonl": "holds no answer",
    "bfcl/BFCL_v4_irrelevance.json": "no gold calls",
    "bfcl/possible_answer/BFCL_v4_multiple.json": "read beside its questions",
    "bfcl/possible_answer/BFCL_v4_parallel.json": "read beside its questions",
    "bfcl/possible_answer/BFCL_v4_parallel_multiple.json": "read beside its questions",
    "bfcl/possible_answer/BFCL_v4_simple_python.json": "read beside its questions",
    "formats/fc_dpo_sample.jsonl": "a preference pair",
    "ifeval/input_data.jsonl": "holds no answer",
    "sealtools/tool.jsonl": "read beside its rows",
    "structured_outputs/example.jsonl": "holds no answer",
    "structured_outputs/structured_outputs_v3_example.jsonl": "holds no answer",
    "structured_outputs/structured_outputs_v4_example.jsonl": "holds no answer",
}
# Tools by name alone and calls as JSON, with reasoning: real prompts in few tokens.
TEMPLATE = MICRO_TEMPLATE.read_text().replace("{% generation %}", "{% generation %}{{ m.reasoning_content or '' }}")
TEMPLATE = TEMPLATE.replace("{% else %}{{ m.content }}{% endif %}{{ eos_token }}", "{% endif %}{{ m.content }}{{ eos_token }}")
RECIPE = """
model: {{init: {model}, tokenizer: {tokenizer}}}
data:
  train: [{{path: {path}, format: {format}}}]
  max_length: 8192
  on_error: skip
  chat_template: {template}
  packing: false
train: {{max_steps: 1, per_device_train_batch_size: 2, global_batch_size: 2, logging_steps: 1}}
tracking: {{mode: disabled}}
output_dir: {run}
"""


@needs_shared
def test_every_file_of_rows_is_in_one_of_the_tables():
    found = {str(path.relative_to(SHARED)) for path in SHARED.rglob("*.json*") if "tinymodels" not in path.parts}
    assert found == FILES.keys() | NOT_TRAINED.keys() and not FILES.keys() & NOT_TRAINED.keys()


@needs_shared
@pytest.mark.parametrize("path", NOT_TRAINED)
def test_a_file_that_holds_nothing_to_train_says_what_it_is(path):
    from harness.data.sources import load_rows
    from harness.errors import DataError
    from harness.recipe.schema import Source

    with pytest.raises(DataError, match=f"{path.rsplit('/')[-1]}:.*{NOT_TRAINED[path]}"):
        load_rows(Source(path=str(SHARED / path)))


# One of each layout; the others are of the same.
FIRST = """
    apibank/apibank_l2.json apibench/api/torchhub_api.jsonl apibench/torchhub_eval.json bfcl/BFCL_v4_parallel.json
    formats/glaive_sample.jsonl formats/hermes_v1_sample.jsonl formats/toolace_sample.jsonl glaive/glaive_toolcall_en_demo.json
    glaive/reason_tool_use_demo_50.jsonl sealtools/dev.jsonl structured_outputs/example_rollouts.jsonl toolpref/ask_first_v1.0.jsonl
    when2call/when2call_test_llm_judge.jsonl xlam/masking_sft_data_example.json
""".split()


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("path", [path if path in FIRST else pytest.param(path, marks=pytest.mark.exhaustive) for path in FILES])
def test_a_model_takes_a_step_on_a_real_file(path, tmp_path):
    held, kept = FILES[path]
    config = json.loads((STORIES / "config.json").read_text()) | {"max_position_embeddings": 8192}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    recipe = tmp_path / "job.yaml"
    run = tmp_path / "run"
    recipe.write_text(
        RECIPE.format(
            model=tmp_path / "config.json",
            tokenizer=STORIES,
            path=SHARED / path,
            format="kto" if path.startswith("toolpref") else "auto",
            template=tmp_path / "chat.jinja",
            run=run,
        )
    )
    life = shared_rig().run(recipe, world=1, backend="single")
    said = life.output(0)
    assert life.wait() == [0], said
    losses = metrics(run, "train/loss")
    assert list(losses) == [1] and 3 < losses[1] < 9, said  # a model that knows nothing: ln(512) = 6.2
    prepared = (life.folder / "prepare.out").read_text()
    rows, read = (int(count.replace(",", "")) for count in re.search(r"train: ([\d,]+) of ([\d,]+) rows", prepared).groups())
    skipped = re.search(r"skipped, not readable as rows: ([\d,]+)", prepared)
    assert read == kept and held - kept == (int(skipped.group(1).replace(",", "")) if skipped else 0), prepared
    assert rows >= 0.9 * kept, prepared  # the rest is longer than 8192 of these tokens
    print(f"{path}: {rows} of {held} rows trained")
