"""What may differ between a checkpoint and the run that continues it, and what is said of the rest."""

import pytest
from conftest import REPOSITORY

from harness.checkpoint.resume import check_engine, check_facts, check_recipe, keep_global_batch
from harness.errors import LaunchError
from harness.launcher import accumulation_steps
from harness.recipe import load
from harness.recipe.backend import load_backend

RECIPE = REPOSITORY / "configs" / "tiny" / "sft-lora.yaml"
BATCHES = ("train.per_device_train_batch_size=4", "train.global_batch_size=null", "train.gradient_accumulation_steps=2")


def manifest_of(recipe, **facts) -> dict:
    return {
        "step": 8,
        "recipe": recipe.model_dump(mode="json"),
        "global_batch": 16,
        "accumulation": 2,
        "world_size": 2,
        "engine": "plain",
        "backend": "ddp",
        "data": {"digest": "d1", "cursor": 32},
        "base": {"name": "b", "digest": "w1"},
        **facts,
    }


def refused(check, *arguments) -> str:
    with pytest.raises(LaunchError) as error:
        check(*arguments)
    return str(error.value)


def test_every_changed_field_is_named_with_both_values_and_the_ways_out():
    then, now = load(RECIPE), load(RECIPE, ["train.learning_rate=0.5", "model.lora.r=3"])
    text = refused(check_recipe, manifest_of(then), now, ())
    assert "checkpoint-8" in text
    assert f"train.learning_rate = 0.5; the checkpoint was made with {then.train.learning_rate}" in text
    assert f"model.lora.r = 3; the checkpoint was made with {then.model.lora.r}" in text
    assert "--allow-change KEY" in text and "--fresh" in text


@pytest.mark.parametrize("allowed", [("train.learning_rate", "model.lora.r"), ("train.learning_rate", "model.lora")])
def test_a_change_that_is_named_is_allowed_and_no_other(allowed):
    then, now = load(RECIPE), load(RECIPE, ["train.learning_rate=0.5", "model.lora.r=3"])
    check_recipe(manifest_of(then), now, allowed)
    assert "model.lora.r" in refused(check_recipe, manifest_of(then), now, allowed[:1])


def test_an_allowed_name_that_nothing_is_called_is_refused():
    recipe = load(RECIPE)
    assert "--allow-change train.lerning_rate: no such setting" in refused(
        check_recipe, manifest_of(recipe), recipe, ("train.lerning_rate",)
    )


@pytest.mark.parametrize(
    "change",
    [
        "output_dir=elsewhere",
        "tracking.project=p",
        "checkpoint.keep=7",
        "train.logging_steps=3",
        "train.dataloader_num_workers=2",
        "backend=ddp",
    ],
)
def test_what_does_not_decide_the_weights_may_change(change):
    check_recipe(manifest_of(load(RECIPE)), load(RECIPE, [change]), ())


def test_other_data_and_another_base_are_refused_unless_named():
    manifest = manifest_of(load(RECIPE))
    facts = {"data": {"digest": "d2"}, "base": {"name": "other", "digest": "w2"}, "teacher": "t2"}
    text = refused(check_facts, manifest, facts, ())
    assert "data: the prepared rows are d2; the checkpoint was made with d1" in text and "base: the weights of other" in text
    assert "teacher: its weights are not those that the checkpoint's run has learnt from" in text
    check_facts(manifest, facts, ("data", "base", "teacher"))


def test_another_reference_is_refused_unless_named_and_the_policy_itself_is_none():
    facts = {"data": {"digest": "d1"}, "base": {"name": "b", "digest": "w1"}, "teacher": None}
    manifest = manifest_of(load(RECIPE), reference="r1")
    assert "reference: the weights that the policy is compared with" in refused(check_facts, manifest, facts | {"reference": "r2"}, ())
    for reference, allowed in (("r1", ()), (None, ()), ("r2", ("reference",))):
        check_facts(manifest, facts | {"reference": reference}, allowed)
    check_facts(manifest_of(load(RECIPE)), facts | {"reference": "r2"}, ())
    check_recipe(manifest, load(RECIPE), ("reference",))


def test_a_field_that_is_newer_than_the_checkpoint_counts_with_its_default():
    recipe = load(
        RECIPE,
        [
            "task=rlhf",
            "model.lora.dropout=0",
            "rlhf.rewards=[{type: tool_calls}]",
            "model.init=null",
            "model.name_or_path=m",
            "data.max_length=512",
        ],
    )
    manifest = manifest_of(recipe)
    del manifest["recipe"]["train"]["weight_decay"], manifest["recipe"]["kto"], manifest["recipe"]["rlhf"]["rewards"][0]["weight"]
    check_recipe(manifest, recipe, ())
    changed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"weight_decay": 0.25})})
    assert "train.weight_decay = 0.25; the checkpoint was made with" in refused(check_recipe, manifest, changed, ())
    # A section that was not asked for then is a change, though all in it are defaults.
    without = manifest_of(load(RECIPE, ["model.lora=null"]))
    assert "model.lora" in refused(check_recipe, without, load(RECIPE, ["model.lora={}"]), ())
    # And what this version does not know any more.
    gone = manifest_of(load(RECIPE))
    gone["recipe"]["train"]["old_trick"] = 3
    assert "train.old_trick = None; the checkpoint was made with 3" in refused(check_recipe, gone, load(RECIPE), ())


def test_a_state_that_the_backend_cannot_read_is_refused_with_the_backend_that_can():
    manifest = manifest_of(load(RECIPE), engine="zero2", backend="zero2")
    text = refused(check_engine, manifest, load_backend("ddp"))
    assert "DeepSpeed's ZeRO stage 2" in text and "continue with backend=zero2" in text
    check_engine(manifest, load_backend("zero2"))
    check_engine(manifest_of(load(RECIPE)), load_backend("single"))  # one rank and DDP write the same


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 4), (4, 1)])
def test_the_accumulation_is_fitted_to_other_ranks_and_said(ranks, accumulation):
    recipe = load(RECIPE, BATCHES)
    fitted, said = keep_global_batch(manifest_of(recipe), recipe, ranks, ())
    assert accumulation_steps(fitted, ranks) == accumulation
    assert f"2 ranks before, {ranks} now: gradient_accumulation_steps is {accumulation} in place of 2" in said


def test_on_the_same_ranks_nothing_is_fitted_or_said():
    recipe = load(RECIPE, BATCHES)
    assert keep_global_batch(manifest_of(recipe), recipe, 2, ()) == (recipe, None)


def test_ranks_that_cannot_make_the_global_batch_are_refused_with_those_that_can():
    recipe = load(RECIPE, BATCHES)
    text = refused(keep_global_batch, manifest_of(recipe), recipe, 3, ())
    assert "3 ranks" in text and "use 1 or 2 or 4 ranks" in text


@pytest.mark.parametrize("change", ["train.gradient_accumulation_steps=3", "train.global_batch_size=24"])
def test_another_global_batch_is_refused_unless_named(change):
    then = load(RECIPE, BATCHES)
    now = load(RECIPE, [*BATCHES, change] if "accumulation" in change else [BATCHES[0], change])
    text = refused(keep_global_batch, manifest_of(then), now, 2, ())
    assert f"{change.split('=')[0]}: a step would take 24 rows; the run takes 16" in text and "--allow-change global_batch" in text
    manifest = manifest_of(then, data={"digest": "d1", "cursor": 48})
    assert keep_global_batch(manifest, now, 2, ("global_batch",)) == (now, None)


def test_another_global_batch_must_begin_where_the_data_stands():
    then, now = load(RECIPE, BATCHES), load(RECIPE, [BATCHES[0], "train.global_batch_size=24"])
    assert "32 rows" in refused(keep_global_batch, manifest_of(then), now, 2, ("global_batch",))
