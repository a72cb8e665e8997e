"""Commits that cannot lie, and a resume that cannot drift.

    manifest.py     manifest.json: what a checkpoint is and every file's size and digest; reading proves itself       (light: no torch)
    ledger.py       ledger.jsonl: what happened to the run, one line per event, flushed to the disk                    (light)
    selection.py    which checkpoint a run continues from: newest first, verified, what is torn put in quarantine      (light)
    retention.py    which checkpoints stay                                                                              (light)
    cadence.py      when to save: steps, minutes, or Young and Daly's interval                                          (light)
    door.py         the stop door: STOP and SAVE files, SIGUSR1, SIGUSR2, SIGTERM                                       (light)
    resume.py       what must be the same for a run to be continued, and what is adjusted                               (light)
    commit.py       the protocol: stage, vote, hash and flush, manifest, one rename, retire
    state.py        what transformers does not carry from one life to the next: random numbers, the log window, assertions
    zero.py         DeepSpeed's shards: saved without a rank left waiting, opened as data, resharded for another number of ranks

The promise: a folder named checkpoint-N is complete on every rank, or is not there. A run may be killed at any instant on any rank.
"""
