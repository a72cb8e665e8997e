"""The story of a run: what it measured, where anyone can read it, and how fast it was.

    metrics.py      metrics.jsonl: names, writing, reading, the picture of the losses      (light: no torch)
    replay.py       what a later life repeats of the earlier ones, and whether it comes out the same
    wandb_run.py    the same lines as one Weights & Biases run that survives a requeue
    sync.py         that run made once more from metrics.jsonl, for lives that were recorded offline, and sent
    callback.py     TrackingCallback: the trainer's logs into both, by rank 0
    flops.py        what a token costs, what a card could do
    throughput.py   Throughput: tokens/s, utilisation, memory and data wait on every training line
    progress.py     ProgressCallback: a bar on a terminal, plain lines in a file

The files of a run folder that this package owns:

    metrics.jsonl   one JSON object per log: {"step": 120, "time": 1760000000.0, "train/loss": 1.234, "speed/tokens_per_s": 18204.0, ...}
                    Append-only over all lives of the run: after a resume the steps since the checkpoint stand there twice, and
                    the later line counts, for it belongs to the weights that the run went on with. It has the same keys, so that
                    a reader needs no rule but that one, and its key "replays" lists those that an earlier life has logged at this
                    step already: W&B, which cannot take a point back, has them under replay/.
                    JSON has no NaN, and a string in a column of numbers breaks whoever reads it; so a value that is not finite
                    is null, and the key "non_finite" names it: "train/loss=nan train/grad_norm=inf".
    wandb.json      {"id": ...}: the W&B run id, made by the first life and used by every later one
    wandb/          W&B's own files, a folder for each life; joined/ is what `harness sync RUN` sends

The heavy modules import transformers; this one does not, so that commands on a login node can read metrics in well under a second.
"""

from harness.tracking.metrics import plot_losses, read_metrics

__all__ = ["plot_losses", "read_metrics"]
