"""The report of a run, or of several beside each other: one page, from what their folders hold; no torch, and nothing is written here.

    write_report(load_stories(runs)) in harness.cli.report; harness.report.live serves the same page while a run grows

    columns.py   metrics.jsonl as columns, read on from where the last look ended
    lives.py     the lives of a run, which steps were kept, and where the time went
    curves.py    what of a column is drawn: kept and lost, thinned without losing a peak
    story.py     everything that is known of one run; its JSON
    memory.py    what the planner forecast, beside what was measured
    panels.py    which metrics are drawn beside which
    plots.py     curves, time line and bars as SVG
    words.py     numbers and durations for people
    headline.py  the sentence at the top
    figures.py   curves, time and memory as sections of the page
    page.py      the page
    live.py      the page on localhost

What the page says is in the run's own files: metrics.jsonl, ledger.jsonl, run.json, recipe.yaml and logs/. A file that is missing, torn
or of another version costs what it would have said, and the page says so.
"""
