"""Kills at random instants: every run must still end bit for bit as the one that nobody killed.

    make faults N=200        or: python tests/faults/fuzz.py [--rounds N] [--seed S] [--results FILE]

A round is one run of jobs.py on two ranks, by turns an adapter under DDP and all weights under ZeRO-2, with a commit at each of its five
steps. Up to three of its lives, one after another, lose rank 0, rank 1 or both, at an instant between the start of the ranks and the length
of a whole life; the rank that is left is ended at once, or goes on until it notices. Then the run is let come to its end. Checked:

    a life begins from the newest checkpoint that lay there when it was started
    on every rank, in every life, each step's weights, optimiser, random numbers, learning rate and samples are the reference's
    the last life ends with 0; logged numbers and exported weights are the reference's; nothing is left of the dead lives

The results, benchmarks/results/faults.json, count the deaths by what the killed ranks were doing (their own last word on it). The seed
fixes who is killed and when by the clock, not at which instruction: a machine's pace differs. The run of a failed round is kept.
"""

import argparse
import collections
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from deaths import JOBS, Run, differences  # noqa: E402
from rig import Life, Refused, Rig, RigError  # noqa: E402

from harness.checkpoint.selection import checkpoints  # noqa: E402
from harness.run import git_commit, library_versions, rank_reports  # noqa: E402

RESULTS = HERE.parents[1] / "benchmarks" / "results" / "faults.json"
MOST_DEATHS = 3
GOES_ON_S = 5.0
"""How long a rank that is left may go on, where it may."""
BEYOND = 1.1
VICTIMS = ([0], [1], [0, 1])


class Failed(Exception):
    """A run that was not continued as it should have been."""


def fuzz(rounds: int, seed: int, work: Path) -> dict:
    """Play the rounds; returns what is written to the results."""
    began, deaths, failures, lives, untouched = time.monotonic(), [], [], 0, 0
    commit, load = git_commit(), os.getloadavg()[0]
    with Rig() as rig:
        references, pace = {}, {}
        for backend in JOBS:
            (work / backend).mkdir()
            references[backend] = Run.of_job(rig, work / backend, backend=backend)
            references[backend].finish()
            # The first life of a rig prepares the data.
            pace[backend] = live_whole(references[backend].beside(work / backend / "again"))
        for number in range(1, rounds + 1):
            backend = list(JOBS)[number % len(JOBS)]
            run = references[backend].beside(work / f"round-{number}" / "run")
            told = random.Random(f"{seed}-{number}")
            here: list[dict] = []
            try:
                pace[backend] = play(run, told, pace[backend], here)
                problems = differences(run, references[backend])
            except (Failed, RigError, Refused) as problem:
                problems = [f"{type(problem).__name__}: {problem}"]
            untouched += not here
            deaths, lives = deaths + here, lives + len(run.lives)
            if problems:
                failures.append(
                    {"round": number, "seed": seed, "backend": backend, "deaths": here, "problems": problems, "run": str(run.path)}
                )
            else:
                shutil.rmtree(run.path.parent)
            died = ", ".join(f"{'+'.join(map(str, death['ranks']))} {death['phase']}" for death in here) or "nobody"
            print(f"{number}/{rounds} {backend}: {died}: {'; '.join(problems) or 'the same'}", flush=True)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "git_commit": commit,
        "machine": {"device": processor(), "cpus": len(os.sched_getaffinity(0)), "load_before": load, "load_after": os.getloadavg()[0]},
        "python": platform.python_version(),
        "versions": library_versions(),
        "seed": seed,
        "rounds": rounds,
        "rounds_without_a_death": untouched,
        "rounds_that_differed": len(failures),
        "lives": lives,
        "deaths": len(deaths),
        "deaths_by_phase": dict(collections.Counter(death["phase"] for death in deaths).most_common()),
        "deaths_by_ranks": dict(collections.Counter("+".join(map(str, death["ranks"])) for death in deaths).most_common()),
        "failures": failures,
        "seconds": round(time.monotonic() - began, 1),
    }


def live_whole(run: Run) -> float:
    """Seconds from the start of the ranks to the end of a life that nobody kills."""
    called = time.monotonic()
    life = run.start()
    started = time.monotonic()
    life.wait()
    return life.seconds - (started - called)


def play(run: Run, told: random.Random, life_s: float, deaths: list[dict]) -> float:
    """The lives of one run. `deaths` is told of each; returns what a whole life takes by now. Raises Failed."""
    for _ in range(told.randint(1, MOST_DEATHS)):
        # A little beyond the end: a life that ends by itself shows how long one takes while the machine is as busy as it is.
        victims, instant, grace_s = told.choice(VICTIMS), told.uniform(0, BEYOND * life_s), told.choice([0, GOES_ON_S])
        newest, called = newest_of(run), time.monotonic()
        life = continue_run(run, grace_s=grace_s)
        if life is None:
            return life_s
        started = time.monotonic()
        time.sleep(instant)
        for rank in victims:
            life.kill(rank)
        codes = life.wait()
        check_beginning(run, newest)
        if not any(codes):
            return life.seconds - (started - called) if newest is None else life_s
        killed = [rank for rank in victims if codes[rank] == -signal.SIGKILL]
        if not killed:
            raise Failed(f"nobody was killed, and the ranks ended with {codes}: {life.output(0)[-2000:]}")
        phases = {report["rank"]: report["phase"] for report in rank_reports(life.attempt, "alive")}
        # "verifying checkpoint-3" is a phase for each step.
        deaths.append({"ranks": killed, "phase": phases.get(killed[0], "starting").partition(" checkpoint-")[0]})
    newest = newest_of(run)
    life = continue_run(run)
    if life is None:
        return life_s
    life.wait()
    check_beginning(run, newest)
    if any(life.codes.values()):
        raise Failed(f"the last life ended with {life.codes}: {life.output(0)[-2000:]}{life.output(1)[-2000:]}")
    return life_s


def continue_run(run: Run, **options) -> Life | None:
    """The next life. None when the last one was killed in its last milliseconds, when it had said that it is done."""
    try:
        return run.start(**options)
    except Refused as refused:
        if run.lives and "this run is complete" in str(refused):
            return None
        raise


def newest_of(run: Run) -> int | None:
    return checkpoints(run.path)[0][0] if checkpoints(run.path) else None


def check_beginning(run: Run, newest: int | None) -> None:
    """Raises Failed unless the last life, if it came so far, began from the newest checkpoint there was."""
    began = run.events("life_began")
    if began and began[-1]["attempt"] == len(run.lives) and began[-1]["resumed_from"] != newest:
        raise Failed(f"began from {began[-1]['resumed_from']}, and checkpoint {newest} was there")


def processor() -> str:
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of who is killed and when; left out: the time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ.setdefault("HARNESS_CACHE", str(work / "cache"))
    result = fuzz(options.rounds, options.seed, work)
    options.results.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{result['deaths']} deaths in {result['rounds']} runs, {result['seconds']:.0f} s; {len(result['failures'])} runs were not the same"
    )
    for phase, count in result["deaths_by_phase"].items():
        print(f"  {count:4} {phase}")
    if result["failures"]:
        print(f"kept: {work}")
        return 1
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
