import json

import pytest
from conftest import harness


@pytest.mark.slow
@pytest.mark.timeout(2500)
def test_the_quickstart_learns_its_tools_and_adapts_to_new_ones_and_writes_what_it_measured(tmp_path):
    done = harness("quickstart", "--output-dir", tmp_path / "runs", timeout_s=2400)
    assert done.code == 0, done.output
    results = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert [stage["name"] for stage in results["stages"]] == ["base", "adapt"]
    for stage in results["stages"]:
        assert stage["before"]["exact_match"] < 0.1
        assert stage["after"]["exact_match"] >= 0.9
        assert stage["after"]["valid_schema"] >= 0.95
        assert stage["after"]["right_abstention"] >= 0.9
        # The table on the screen shows the file's numbers.
        assert f"{stage['before']['exact_match']:.1%} → {stage['after']['exact_match']:.1%}" in done.output
    teacher, taught, alone = (results["distill"][name] for name in ("teacher", "taught", "alone"))
    assert taught["parameters"] == alone["parameters"] <= teacher["parameters"] / 3
    assert teacher["exact_match"] >= 0.9
    # What a teacher brings here is a few percent, which another processor's rounding may eat up.
    assert taught["exact_match"] >= alone["exact_match"] - 0.05 and taught["exact_match"] > 0.5
    assert taught["valid_schema"] >= 0.95
    assert f"{taught['exact_match']:.1%}" in done.output and f"{alone['exact_match']:.1%}" in done.output
    preferred = results["prefer"]
    assert preferred["pairs"] > 100 and preferred["accuracy"]["after"] > preferred["accuracy"]["before"]
    # A point or two more or less is another processor's rounding; it must not have unlearnt what it could.
    assert preferred["before"] == taught and preferred["after"]["exact_match"] >= taught["exact_match"] - 0.02
    assert preferred["after"]["valid_schema"] >= 0.95
    assert (tmp_path / "runs" / "losses.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "runs" / "report.html").read_text()
    assert "5 runs: 5 done" in page and "Curves: dpo" in page
    # It promises eight minutes of two cores that nobody else uses, and these may be shared.
    assert 0 < results["seconds"] < 2400
