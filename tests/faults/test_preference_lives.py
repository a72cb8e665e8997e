"""DPO and KTO over the grid {full, LoRA, QLoRA} x {single, ddp x2, zero2, zero3}: the losses of one process on any backend, and a run that
was killed and continued is, bit for bit, the one that was not."""

import functools

import pytest
from lives import Run, check_same
from rig import die_at_call, die_in_phase

PAIRS = [
    "task=dpo",
    "model.lora.dropout=0",
    'data.train=[{path: "embedded:pairs-train", max_rows: 40}]',
    'data.eval=[{path: "embedded:pairs-eval", max_rows: 9}]',
]
VARIANTS = {"full": ["model.lora=null", "train.learning_rate=1e-3"], "lora": [], "qlora": ["model.quantization.load_in_4bit=true"]}
BACKENDS = ["single", "ddp", "zero2", "zero3"]
QUICK = {("lora", "ddp"), ("full", "zero3")}
GRID = [
    pytest.param(variant, backend, marks=[] if (variant, backend) in QUICK else pytest.mark.slow)
    for variant in VARIANTS
    for backend in BACKENDS
]
STEP_12 = "harness.tasks.trainer:HarnessTrainer.training_step"
LOGGED = ("loss", "rewards/margins", "logps/chosen_drift", "kl", "length/gap")
OF_PAIRS = ("rewards/accuracies",)
# Sums of float32 in another order, over 14 steps of AdamW whose first ones divide by nearly nothing.
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """single(variant) -> the run of one process that nobody interrupted."""
    folder = tmp_path_factory.mktemp("single")

    @functools.cache
    def run(*overrides: str) -> Run:
        whole = Run(folder / str(abs(hash(overrides))), *overrides, backend="single")
        whole.live()
        return whole

    return run


def check_cut_is_whole(tmp_path, overrides, backend, single) -> Run:
    """Killed in its second save, and two steps after a save that ends an epoch."""
    alone = single(*overrides)
    whole = alone if backend == "single" else Run(tmp_path / "whole", *overrides, backend=backend)
    if whole is not alone:
        whole.live()
    cut = Run(tmp_path / "cut", *overrides, backend=backend)
    cut.live(die_in_phase(0, "saving: manifest", 2), code=-9)
    cut.live(die_at_call(cut.world - 1, STEP_12, 7 if cut.world == 2 else 14), code=-9)
    cut.live()
    assert [event["resumed_from"] for event in cut.events("life_began")] == [None, 5, 10]
    check_same(cut, whole, repeats=True)
    points, expected = whole.points(), alone.points()
    for area in ("train", "eval"):
        for key in LOGGED + (() if "task=kto" in overrides else OF_PAIRS):
            ours = {step: value for (step, name), value in points.items() if name == f"{area}/{key}"}
            theirs = {step: value for (step, name), value in expected.items() if name == f"{area}/{key}"}
            assert len(ours) >= 4 and ours == pytest.approx(theirs, abs=TOLERANCE, rel=TOLERANCE), (area, key)
    return whole


@pytest.mark.parametrize(("variant", "backend"), GRID)
def test_preference_training_is_the_same_on_any_backend_and_whatever_kills_it(tmp_path, single, variant, backend):
    whole = check_cut_is_whole(tmp_path, PAIRS + VARIANTS[variant], backend, single)
    margins = [value for (_, key), value in sorted(whole.points().items()) if key == "train/rewards/margins"]
    assert margins[0] == pytest.approx(0, abs=1e-4) and max(map(abs, margins)) > 0.03


LABELS = ["task=kto", *PAIRS[1:2], 'data.train=[{path: "embedded:answers-train", max_rows: 40}]']
LABELS += ['data.eval=[{path: "embedded:answers-eval", max_rows: 9}]']
OTHERS = {
    "kto, an adapter": ("ddp", LABELS),
    "kto, all weights, cached": ("zero2", [*LABELS, *VARIANTS["full"]]),
    "dpo, a resident reference in shares": ("zero3", [*PAIRS, *VARIANTS["full"], "dpo.reference=resident"]),
    "dpo, an adapter, cached": ("zero3", [*PAIRS, "dpo.reference=cached"]),
    "dpo, several losses, workers": (
        "single",
        [*PAIRS, "dpo.loss_type=[ipo, sft]", "dpo.loss_weights=[1, 0.2]", "train.dataloader_num_workers=2"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_so_it_is_with(tmp_path, single, name):
    backend, overrides = OTHERS[name]
    check_cut_is_whole(tmp_path, overrides, backend, single)
