"""TRL's sides of distill_steps.py, for which TRL has no command: GKD has an example, and the chunked divergence a trainer that takes
prompts alone and writes the rest itself. So both are given the same rows by GKD's trainer, off-policy (lmbda = 0).

    python benchmarks/distill_trl.py SETTINGS.json
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch  # noqa: E402
from datasets import load_dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: E402
from trl.trainer.distillation_trainer import _chunked_divergence_loss  # noqa: E402


class ChunkedTrainer(GKDTrainer):
    """The loss of DistillationTrainer, from the hidden states of the rows that GKD's collator makes."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.accelerator.autocast():
            hidden = states_of(model, inputs)
            with torch.no_grad():
                taught = states_of(self.teacher_model, inputs)
            loss, _, _ = _chunked_divergence_loss(
                hidden,
                taught,
                model.lm_head.weight,
                self.teacher_model.lm_head.weight,
                inputs["labels"][:, 1:] != -100,
                self.beta,
                num_items_in_batch,
            )
        return loss


def states_of(model, inputs) -> torch.Tensor:
    """[B, T - 1, H]: each predicts the token after it."""
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    return model.get_decoder()(**given, use_cache=False).last_hidden_state[:, :-1]


def main(file: str) -> None:
    settings = json.loads(Path(file).read_text())
    load = {"dtype": getattr(torch, settings["student_dtype"]), "attn_implementation": "sdpa"}
    student = AutoModelForCausalLM.from_pretrained(settings["student"], **load)
    teacher = AutoModelForCausalLM.from_pretrained(settings["teacher"], **load | {"dtype": getattr(torch, settings["teacher_dtype"])})
    kind = {"GKD": GKDTrainer, "chunked": ChunkedTrainer}[settings["loss"]]
    trainer = kind(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(**settings["arguments"], lmbda=0.0),
        train_dataset=load_dataset("json", data_files=settings["rows"], split="train"),
        processing_class=AutoTokenizer.from_pretrained(settings["student"]),
    )
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1])
