import json
from pathlib import Path

import click

from harness.cli.tables import print_table, printable
from harness.evaluate.scoring import CLASSES, MODES, load_predictions, report_scores, score_predictions
from harness.evaluate.suite import SUITES, load_questions

PATH = click.Path(path_type=Path)


@click.command("score")
@click.argument("predictions", type=PATH)
@click.option("--suite", type=click.Choice(SUITES), required=True, help="Whose questions they answer.")
@click.option("--questions", type=PATH, multiple=True, required=True, help="A file of questions, or a folder of them; may be repeated.")
@click.option("--answers", type=PATH, multiple=True, help="A file of right answers, or a folder of them; may be repeated.")
@click.option("--mode", type=click.Choice(MODES), required=True, help="bfcl: as the leaderboard judges. strict: as a called program would.")
@click.option("--underscore-names", is_flag=True, help='The model was shown "a_b" for a function "a.b", which some servers refuse.')
@click.option("--json", "as_json", is_flag=True, help="Everything, as a JSON object.")
def command(
    predictions: Path, suite: str, questions: tuple[Path, ...], answers: tuple[Path, ...], mode: str, underscore_names: bool, as_json: bool
):
    """Score the rows of PREDICTIONS, {"id", "calls": [{"name", "arguments"}]} or {"id", "text"}, and list those that fail."""
    known = load_questions(questions, answers, underscore_names=underscore_names)
    report = report_scores(score_predictions(load_predictions(predictions), known, mode), known, suite=suite, mode=mode)
    if as_json:
        click.echo(printable(json.dumps(report, indent=2, ensure_ascii=False)))
    else:
        print_report(report)


def print_report(report: dict) -> None:
    rows = []
    for category, found in report["by_category"].items():
        low, high = found["interval"]
        rows.append(
            (
                category,
                f"{found['accuracy']:.1%}",
                f"{low:.1%} to {high:.1%}",
                f"{found['correct']} of {found['n']}",
                str(found["unanswered"]),
            )
        )
    print_table(("category", "right", "95 % interval", "rows", "without a row"), rows, right=("right", "rows", "without a row"))
    click.echo()
    print_table(("class", "rows"), [(name, str(report["by_class"][name])) for name in CLASSES if report["by_class"][name]], right=("rows",))
    for note in _notes(report):
        click.echo(f"\n{note}")
    if report["failing"]:
        click.echo()
        print_table(("failing", "class", "reason"), [(row["id"], row["class"], row["reason"]) for row in report["failing"]])


def _notes(report: dict) -> list[str]:
    notes = []
    if taken := report["abstention"]["malformed_taken_for_right"]:
        notes.append(
            f"{len(taken)} of the {report['abstention']['n']} rows where nothing is to be called are right by the leaderboard's rules "
            f"although they try to call, in a form that it cannot decode (such as {taken[0]}); --mode strict counts them as malformed"
        )
    if broken := report["gold_breaks_schema"]:
        notes.append(f"gold itself breaks its tool's schema in {', '.join(broken)}; there gold alone decides")
    return notes
