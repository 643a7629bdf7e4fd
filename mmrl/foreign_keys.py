"""What other trainers call the keys of a recipe: TRL, transformers, PEFT, verl, ms-swift, diffusers.

Whoever writes one of their names is told the key here. It is a hint alone: nothing is renamed in silence.
"""

from __future__ import annotations

_MEMORY = "policy.max_tokens (text) or policy.max_batch, which change memory and not the gradient"
_PRECISION = "run.mixed_precision (of the update) and policy.dtype (of the weights)"

FOREIGN_KEYS: dict[str, str] = {
    # ---- optimizer
    "learning_rate": "optim.lr",
    "lr_scheduler": "optim.schedule",
    "lr_scheduler_type": "optim.schedule",
    "warmup_steps": "optim.warmup",
    "warmup_ratio": "optim.warmup",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "adam_epsilon": "optim.eps",
    "adam_weight_decay": "optim.weight_decay",
    "gradient_clipping": "optim.max_grad_norm",
    "max_norm": "optim.max_grad_norm",
    "num_iterations": "optim.updates_per_rollout",
    "ppo_epochs": "optim.updates_per_rollout",
    "optimizer": "optim.name",
    "optim_args": "optim.options",
    "use_8bit_adam": "optim.name: adamw_8bit",
    "lr_scheduler_kwargs": "optim.schedule_options",
    "use_ema": "optim.ema",
    # ---- length and size
    "num_train_epochs": "run.epochs",
    "total_epochs": "run.epochs",
    "total_training_steps": "run.iterations",
    "max_train_steps": "run.iterations",
    "per_device_train_batch_size": "run.prompts_per_iteration, over all processes",
    "train_batch_size": "run.prompts_per_iteration, over all processes",
    "generation_batch_size": "run.prompts_per_iteration, over all processes",
    "batch_size": "run.prompts_per_iteration, over all processes",
    "gradient_accumulation_steps": _MEMORY,
    "micro_batch_size": _MEMORY,
    "gradient_checkpointing": "policy.gradient_checkpointing",
    "precision": _PRECISION,
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "torch_dtype": "policy.dtype",
    # ---- the run
    "output_dir": "run.output",
    "save_steps": "run.checkpoint_every",
    "save_freq": "run.checkpoint_every",
    "save_total_limit": "run.keep_checkpoints",
    "eval_steps": "run.eval_every",
    "eval_freq": "run.eval_every",
    "test_freq": "run.eval_every",
    "report_to": "run.trackers",
    "log_with": "run.trackers",
    "resume_from_checkpoint": "run.resume",
    "load_best_model_at_end": "callbacks, such as callbacks: [{name: best_model, metric: eval/reward}]",
    "metric_for_best_model": "callbacks, such as callbacks: [{name: best_model, metric: eval/reward}]",
    "early_stopping_patience": "callbacks, such as callbacks: [{name: early_stop, metric: eval/reward}]",
    "push_to_hub": "callbacks, such as callbacks: [{name: push_to_hub, repo: user/name}]",
    # ---- model
    "model_name_or_path": "policy.model",
    "model_id": "policy.model",
    "pretrained_model_name_or_path": "policy.model",
    "attn_implementation": "policy.attn",
    "use_vllm": "policy.engine",
    "use_peft": "policy.lora_rank",
    "lora_r": "policy.lora_rank",
    "freeze_vit": "policy.train_vision",
    "freeze_vision_tower": "policy.train_vision",
    # ---- sampling
    "num_generations": "plan, such as plan: {0: 8}",
    "rollout_n": "plan, such as plan: {0: 8}",
    "max_completion_length": "policy.max_new_tokens",
    "max_response_length": "policy.max_new_tokens",
    "max_tokens_to_sample": "policy.max_new_tokens",
    "max_prompt_length": "policy.max_prompt_tokens",
    "system_prompt": "policy.system",
    "num_inference_steps": "policy.steps",
    "sample_num_steps": "policy.steps",
    "resolution": "policy.height and policy.width",
    # ---- loss and credit
    "beta": "loss.kl",
    "kl_coef": "loss.kl",
    "kl_loss_coef": "loss.kl",
    "sync_ref_model": "loss.reference_every",
    "ref_model_sync_steps": "loss.reference_every",
    "ref_model_mixup_alpha": "loss.reference_share",
    "epsilon": "loss.clip_low and loss.clip_high",
    "epsilon_high": "loss.clip_high",
    "clip_range": "loss.clip_low and loss.clip_high",
    "cliprange": "loss.clip_low and loss.clip_high",
    "clip_ratio": "loss.clip_low and loss.clip_high",
    "clip_ratio_low": "loss.clip_low",
    "clip_ratio_high": "loss.clip_high",
    "delta": "loss.dual_clip",
    "clip_ratio_c": "loss.dual_clip",
    "adv_clip_max": "credit.clip",
    "mask_truncated_completions": "loss.mask_truncated",
    "overlong_filter": "loss.mask_truncated",
    "overlong_buffer_len": "credit.transforms: [{name: overlong, limit, buffer}]",
    "top_entropy_quantile": "loss.top_entropy",
    "steps_per_generation": "optim.minibatches",
    "ppo_mini_batch_size": "optim.minibatches",
    "loss_type": "loss.aggregation",
    "loss_agg_mode": "loss.aggregation",
    "importance_sampling_level": "loss.ratio",
    "vllm_importance_sampling_cap": "loss.importance_cap",
    "scale_rewards": "credit.estimators, such as dr_grpo",
    "adv_estimator": "credit.estimators",
    # ---- data and rewards
    "dataset_name": "task.train and task.eval",
    "train_files": "task.train",
    "val_files": "task.eval",
    "image_root": "task.media_root",
    "reward_funcs": "rewards",
    "reward_weights": "rewards.0.weight",
    "filter_groups": "run.refill",
    "dynamic_sample": "run.refill",
}


def key_here(name: str) -> str:
    """The end of a message about an unknown key that other trainers have: what it is here, else empty."""
    key = FOREIGN_KEYS.get(name)
    return f" (here: {key})" if key else ""
