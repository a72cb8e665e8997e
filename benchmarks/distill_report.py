"""The results of distill.py as markdown: values are median (min to max), and beside each aim stands whether it is met."""

import distill_steps
from distill_steps import CACHED
from sft import describe, gib, memory_name

STEPS_AIM, MEMORY_AIM, BARE_AIM, CAPTURE_AIM, READING_AIM, BYTES_AIM = 3.0, 1 / 5, 1.25, 0.9, 10.0, 60.0
GKD = f"TRL GKD, {distill_steps.KL}"


def render(result: dict) -> str:
    parts = (render_setting, render_steps, render_losses, render_capture, render_reading, render_bytes)
    return "\n".join(line for part in parts for line in part(result)) + "\n"


def render_setting(result: dict) -> list[str]:
    machine, size, parameters = result["machine"], result["size"], result["parameters"]
    lines = [
        f"# Distillation: from a cache, beside a teacher, and by TRL, on a {'GPU' if result['kind'] == 'gpu' else 'CPU'}",
        "",
        f"{result['date']}, commit {result['git_commit'] or 'unknown'}.",
        f"{machine['device']}, {machine['cpus']} cores, {gib(machine['memory_bytes'])} GiB; "
        f"load {machine['load_before']:.1f} at the start, {machine['load_after']:.1f} at the end.",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + f"; Python {machine['python']}.",
        "",
        f"Llamas drawn from a seed: a teacher of {parameters['teacher'] / 1e6:,.1f} M parameters, a student of "
        f"{parameters['student'] / 1e6:,.1f} M, V = {size['vocabulary']:,}; batches of {size['batch']} rows of {size['context']} tokens, "
        "seven eighths of them trained. Values are median (min to max).",
        "",
    ]
    if machine["load_before"] > machine["cpus"] / 2:
        lines += [
            f"**Others used the machine** (load {machine['load_before']:.1f} on {machine['cpus']} cores before anything began): of the "
            "ratios those by CPU seconds say more.",
            "",
        ]
    return lines


def verdict(aim: str, holds: bool, result: dict) -> str:
    # Told apart, because the aims are of another machine.
    return f"Aim{'' if result['kind'] == 'gpu' else ' (of a GPU)'}: {aim}. {'Met.' if holds else 'Not met.'}"


# ---- whole steps


def render_steps(result: dict) -> list[str]:
    steps = result["steps"]
    rows = [
        f"| {side['side']} | {side['tokens_per_s']:,.0f} | {describe(side['step_s'])} | {describe(side['cached_is_faster'], 2)} | "
        f"{describe(side['cached_is_faster_in_cpu_s'], 2)} | {gib(side['peak_bytes'])} |"
        for side in steps["sides"]
    ]
    gkd = next(side for side in steps["sides"] if side["side"] == GKD)
    return [
        "## Whole steps",
        "",
        f"| | tokens/s | seconds per step | cached is faster by | by CPU seconds | {memory_name(result['kind'])} |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"Losses that are the same by mathematics differ by at most {steps['largest_loss_difference']:.1e} at any step, ours and TRL's.",
        "",
        verdict(f"cached at least {STEPS_AIM:g} times GKD's tokens per second", faster(gkd) >= STEPS_AIM, result),
        "",
    ]


def faster(side: dict) -> float:
    """By CPU seconds on a CPU they are the same but for what others do."""
    return side["cached_is_faster"]["median"]


# ---- the loss alone


def render_losses(result: dict) -> list[str]:
    lines = ["## The loss alone", ""]
    for case in result["losses"]:
        shape, ways = case["shape"], case["ways"]
        lines += [
            f"{shape['tokens']:,} tokens, V = {shape['vocabulary']:,}, H = {shape['student_hidden']:,} (teacher "
            f"{shape['teacher_hidden']:,}), the head {'trains' if case['trains_head'] else 'is frozen'}; the bare products "
            f"{describe(case['bare']['of the student'])} s, with the teacher's {describe(case['bare']['of student and teacher'])} s.",
            "",
            "| | seconds | / bare products | by CPU seconds | memory, MiB |",
            "|---|---|---|---|---|",
            *(
                f"| {name} | {describe(way['seconds'])} | {describe(way['over_bare'], 2)} | {describe(way['over_bare_in_cpu_s'], 2)} | "
                f"{way['bytes'] / 2**20:,.0f} |"
                for name, way in ways.items()
            ),
            "",
            f"Losses and gradients of the same mathematics differ by at most {case['largest_difference']:.1e}; the cached loss, of "
            f"{case['entries']:.0f} entries and a tail, is {case['cached_over_dense']:.4f} of the dense one.",
            "",
            verdict(f"cached within {BARE_AIM:g} times its bare products", over_bare(ways[CACHED], result) <= BARE_AIM, result),
            verdict("cached at most 1/5 of GKD's memory", ways[CACHED]["bytes"] <= MEMORY_AIM * ways[GKD]["bytes"], result),
            "",
        ]
    return lines


def over_bare(way: dict, result: dict) -> float:
    """On a CPU by the CPU's seconds, which its other work does not change."""
    return way["over_bare" if result["kind"] == "gpu" else "over_bare_in_cpu_s"]["median"]


# ---- the cache


def render_capture(result: dict) -> list[str]:
    found = result["capture"]
    ratio = found["over_bare" if result["kind"] == "gpu" else "over_bare_in_cpu_s"]["median"]
    return [
        "## Capture",
        "",
        "| units | capture, tokens/s | the same teacher's bare forward, tokens/s | capture / bare | by CPU seconds |",
        "|---|---|---|---|---|",
        f"| {found['units']} | {describe(found['capture_tokens_per_s'], 0)} | {describe(found['bare_tokens_per_s'], 0)} | "
        f"{describe(found['over_bare'], 2)} | {describe(found['over_bare_in_cpu_s'], 2)} |",
        "",
        "Bare: logits of all tokens of the same batches by the model's own forward, nothing kept. Capture: from there to units that are on "
        f"the disk; of the logits those of trained tokens alone ({found['trained_share']:.0%}).",
        "",
        verdict(f"at least {CAPTURE_AIM} of the bare forward", ratio >= CAPTURE_AIM, result),
        "",
    ]


def render_reading(result: dict) -> list[str]:
    reading = result["reading"]
    needed = next(side for side in result["steps"]["sides"] if side["side"] == CACHED)["tokens_per_s"]
    times = {kind: found["tokens_per_s"]["median"] / needed for kind, found in reading.items()}
    return [
        "## Reading",
        "",
        "| | tokens/s | times what training takes | pages from the disk |",
        "|---|---|---|---|",
        *(
            f"| {kind} | {describe(found['tokens_per_s'], 0)} | {times[kind]:,.0f} | {found['faults']:,.0f} |"
            for kind, found in reading.items()
        ),
        "",
        f"One process and one thread, with the opening of the cache. Training from it takes {needed:,.0f} tokens/s here.",
        "",
        verdict(f"at least {READING_AIM:g} times what training needs", min(times.values()) >= READING_AIM, result),
        "",
    ]


def render_bytes(result: dict) -> list[str]:
    rows, formats = [], ("harness", "Megatron", "DistillKit")
    for found in result["bytes"]:
        sizes = [f"{value:,.0f}" for name in formats for value in found[name].values()]
        facts = f"{found['vocabulary']:,} | {found['entropy_nats']:.2f} | {found['mass_of_64']:.3f}"
        rows.append(f"| {found['distribution']} | {facts} | {' | '.join(sizes)} |")
    first = result["bytes"][0]
    heads = [f"{name}, {setting}" for name in formats for setting in first[name]]
    return [
        "## Bytes per trained token",
        "",
        f"| distribution | V | entropy, nats | mass of 64 | {' | '.join(heads)} |",
        f"|---|---|---|---|{'---|' * len(heads)}",
        *rows,
        "",
        "The same distributions in each format: ours whole files, with an index, checksums, entropy and the gold token; Megatron's values "
        "and ids (top-p 0.99, zstd), which end at a vocabulary of 131,072; DistillKit's as its formula has it, whatever the distribution. "
        "The first two are drawn as shared/research/distillation.md 2.3 says.",
        "",
        # Of the format, not of a machine.
        f"Aim: at most {BYTES_AIM:g} on tool-calling data. {'Met.' if first['harness']['ghost'] <= BYTES_AIM else 'Not met.'}",
    ]
