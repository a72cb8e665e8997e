"""Other people's names for our keys, for the error message of someone who comes from there. Nothing is accepted by another name."""

import difflib

# LLaMA-Factory, axolotl, TRL's CLI, ms-swift and torchtune names -> where the same thing stands in a recipe.
ELSEWHERE = {
    "model_name_or_path": "model.name_or_path",
    "base_model": "model.name_or_path",
    "model_id": "model.name_or_path",
    "model_revision": "model.revision",
    "tokenizer_name_or_path": "model.tokenizer",
    "torch_dtype": "model.dtype",
    "flash_attn": "model.attn_implementation",
    "flash_attention": "model.attn_implementation",
    "attn_impl": "model.attn_implementation",
    "load_in_4bit": "model.quantization.load_in_4bit",
    "use_bnb_nested_quant": "model.quantization.bnb_4bit_use_double_quant",
    "double_quantization": "model.quantization.bnb_4bit_use_double_quant",
    "quantization_bit": "model.quantization (4-bit only)",
    "quantization_config": "model.quantization",
    "peft_config": "model.lora",
    "adapter": "model.lora",
    "finetuning_type": "model.lora (with it: LoRA; without: full fine-tuning)",
    "use_peft": "model.lora (with it: LoRA; without: full fine-tuning)",
    "tuner_type": "model.lora (with it: LoRA; without: full fine-tuning)",
    "train_type": "model.lora (with it: LoRA; without: full fine-tuning)",
    "lora_r": "model.lora.r",
    "lora_rank": "model.lora.r",
    "rank": "model.lora.r",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_target": "model.lora.target_modules",
    "lora_target_modules": "model.lora.target_modules",
    "lora_target_linear": "model.lora.target_modules: all-linear",
    "lora_modules_to_save": "model.lora.modules_to_save",
    "additional_target": "model.lora.modules_to_save",
    "stage": "task",
    "teacher_model_name_or_path": "teacher.name_or_path",
    "teacher_model": "teacher.name_or_path",
    "teacher_model_revision": "teacher.revision",
    "kd_ce_alpha": "distill.weight (of the divergence; the rest is the cross-entropy's)",
    "kd_alpha": "distill.weight",
    "kd_ratio": "distill.weight",
    "kd_temperature": "distill.temperature",
    "loss_top_k": "teacher.cap",
    "lmbda": "distill.on_policy.fraction",
    "max_completion_length": "distill.on_policy.max_new_tokens",
    "top_k": "teacher.cap`, or of a student that writes `distill.on_policy.top_k",
    "rl": "task",
    "rlhf_type": "task",
    "pref_beta": "dpo.beta",
    "pref_loss": "dpo.loss_type",
    "pref_ftx": "dpo.loss_type: [sigmoid, sft]",
    "rpo_alpha": "dpo.loss_type: [sigmoid, sft]",
    "dpo_beta": "dpo.beta",
    "dpo_label_smoothing": "dpo.label_smoothing",
    "kto_desirable_weight": "kto.desirable_weight",
    "kto_undesirable_weight": "kto.undesirable_weight",
    "precompute_ref_log_probs": "dpo.reference: cached",
    "precompute_reference_log_probs": "dpo.reference: cached",
    "ref_model": "dpo.reference (it is always the model that the run begins from)",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "sample_packing": "data.packing",
    "neat_packing": "data.packing",
    "padding_free": "data.packing",
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "eval_dataset": "data.eval",
    "test_datasets": "data.eval",
    "val_size": "data.eval_fraction",
    "val_set_size": "data.eval_fraction",
    "split_dataset_ratio": "data.eval_fraction",
    "dataset_num_proc": "data.num_proc",
    "preprocessing_num_workers": "data.num_proc",
    "dataset_processes": "data.num_proc",
    "template": "data.chat_template",
    "chat_template_path": "data.chat_template",
    "train_on_prompt": "data.train_on: all",
    "train_on_inputs": "data.train_on: all",
    "assistant_only_loss": "data.train_on: assistant",
    "micro_batch_size": "train.per_device_train_batch_size",
    "per_device_batch_size": "train.per_device_train_batch_size",
    "batch_size": "train.per_device_train_batch_size, or train.global_batch_size over all ranks",
    "train_batch_size": "train.global_batch_size",
    "eval_batch_size": "train.per_device_eval_batch_size",
    "num_epochs": "train.num_train_epochs",
    "epochs": "train.num_train_epochs",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler_type",
    "optimizer": "train.optim",
    "warmup": "train.warmup_steps",
    "max_grad_norm_clip": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "evaluation_strategy": "train.eval_strategy",
    "evals_per_epoch": "train.eval_strategy and train.eval_steps",
    "load_best_model_at_end": "train.metric_for_best_model",
    "use_liger": "train.use_liger_kernel",
    "enable_liger_kernel": "train.use_liger_kernel",
    "liger_kernel": "train.use_liger_kernel",
    "save_steps": "checkpoint.every_steps",
    "save_strategy": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "logging_nan_inf_filter": "guard.max_skips",
    "saves_per_epoch": "checkpoint.every_steps",
    "deepspeed": "backend",
    "fsdp": "backend",
    "fsdp_config": "backend",
    "deepspeed_config": "backend",
    "accelerate_config": "backend",
    "report_to": "tracking.mode",
    "wandb_project": "tracking.project",
    "wandb_entity": "tracking.entity",
    "wandb_name": "tracking.name",
    "wandb_run_id": "tracking (the id is kept in the run folder)",
    "run_name": "tracking.name",
    "project": "tracking.project",
    "data_path": "data.train",
    "train_file": "data.train",
}


def advise_key(key: str, siblings: list[str], everywhere: dict[str, str], elsewhere: dict[str, str] = ELSEWHERE) -> str:
    """What the writer of an unknown key most likely meant.

    siblings: the keys of the section that the key stands in. everywhere: leaf key -> dotted key, over the whole file.
    elsewhere: other people's names -> what is written here instead.
    """
    # First: what others call top_k is not what a student that writes has under this name.
    if key in elsewhere:
        return f"`{key}` is `{elsewhere[key]}` here"
    if key in everywhere:
        return f"`{key}` stands at `{everywhere[key]}`"
    close = difflib.get_close_matches(key, siblings, n=1, cutoff=0.75)
    if close:
        return f"did you mean `{close[0]}`?"
    close = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6) or difflib.get_close_matches(key, list(everywhere), n=1, cutoff=0.8)
    if close:
        where = close[0] if close[0] in siblings else everywhere[close[0]]
        return f"did you mean `{where}`?"
    return "known here: " + ", ".join(siblings)
