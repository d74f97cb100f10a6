"""Explains what is wrong with a config: one line per key, with the fix and a guess at what was meant."""

from __future__ import annotations

import difflib
import json
import os
from typing import get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tristage.config.renamed import new_name

# Type of a pydantic error -> what to do, with the error's own numbers and names.
FIXES = {
    "string_type": "write text",
    "string_too_short": "write at least {min_length} character",
    "int_type": "give a whole number",
    "int_parsing": "give a whole number",
    "int_from_float": "give a whole number",
    "float_type": "give a number",
    "float_parsing": "give a number",
    "finite_number": "give a finite number",
    "greater_than": "give a number above {gt:g}",
    "greater_than_equal": "give {ge:g} or more",
    "less_than": "give a number below {lt:g}",
    "less_than_equal": "give {le:g} or less",
    "bool_type": "write true or false",
    "bool_parsing": "write true or false",
    "literal_error": "write {expected}",
    "model_type": "write a group of settings, `key: value` lines",
    "dict_type": "write a group of settings, `key: value` lines",
    "tuple_type": "write a list",
    "too_short": "give a list of at least {min_length}",
    "too_long": "give a list of at most {max_length}",
}
UNION_BRANCHES = {"str", "tuple[str, ...]"}  # pydantic names them in the place of an error
CUTOFF = 0.75  # of difflib's similarity: below it a guess misleads

_STEP_BATCH, _MICRO_BATCH = ("global_batch", "ppo.minibatch"), ("micro_batch",)
# Names of DeepSpeed-Chat, TRL, OpenRLHF and transformers -> ours, the first that the step has.
OTHER_TOOLS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("batch_size", "train_batch_size", "mini_batch_size", "gradient_accumulation_steps"), _STEP_BATCH),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_training_batch_size"), _MICRO_BATCH),
    **dict.fromkeys(("per_device_eval_batch_size", "micro_train_batch_size", "micro_batch_size"), _MICRO_BATCH),
    "train_micro_batch_size_per_gpu": _MICRO_BATCH,
    **dict.fromkeys(("rollout_batch_size", "per_device_generation_batch_size"), ("rollout.prompts",)),
    **dict.fromkeys(("micro_rollout_batch_size", "local_rollout_forward_batch_size"), ("rollout.rows_at_once",)),
    **dict.fromkeys(("num_generations", "n_samples_per_prompt"), ("rollout.samples",)),
    **dict.fromkeys(("lr", "lora_learning_rate"), ("optimizer.learning_rate",)),
    **dict.fromkeys(("actor_lr", "actor_learning_rate"), ("actor.optimizer.learning_rate",)),
    **dict.fromkeys(("critic_lr", "critic_learning_rate"), ("critic.optimizer.learning_rate",)),
    **dict.fromkeys(("max_grad_norm", "max_norm", "grad_clip", "gradient_clipping"), ("optimizer.clip_norm",)),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "scheduler"), ("optimizer.schedule",)),
    **dict.fromkeys(("num_warmup_steps", "warmup_ratio", "lr_warmup_ratio"), ("optimizer.warmup_steps",)),
    **dict.fromkeys(("adam_epsilon", "adam_eps"), ("optimizer.eps",)),
    "adam_betas": ("optimizer.betas",),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "max_epochs"), ("iterations", "epochs")),
    **dict.fromkeys(("total_episodes", "num_episodes", "num_iterations"), ("iterations", "max_steps")),
    **dict.fromkeys(("num_ppo_epochs", "ppo_epochs"), ("ppo.epochs",)),
    **dict.fromkeys(("max_seq_length", "max_seq_len", "max_length", "max_len"), ("max_tokens", "max_prompt_tokens")),
    **dict.fromkeys(("max_prompt_length", "max_prompt_seq_len", "prompt_max_len"), ("max_prompt_tokens", "max_tokens")),
    **dict.fromkeys(("max_new_tokens", "response_length", "generate_max_len"), ("rollout.max_response_tokens",)),
    **dict.fromkeys(("max_answer_seq_len", "max_completion_length"), ("rollout.max_response_tokens",)),
    **dict.fromkeys(("eos_token_id", "stop_token_id", "stop_token"), ("rollout.stop_token_ids",)),
    **dict.fromkeys(("init_kl_coef", "kl_ctl", "kl_penalty"), ("ppo.kl_coef",)),
    **dict.fromkeys(("cliprange", "clip_range", "eps_clip", "epsilon"), ("ppo.clip",)),
    **dict.fromkeys(("cliprange_value", "clip_range_value"), ("ppo.value_clip",)),
    **dict.fromkeys(("cliprange_reward", "clip_reward_value", "reward_clip_range"), ("ppo.reward_clip",)),
    **dict.fromkeys(("lambd", "gae_lambda"), ("ppo.lam",)),
    "advantage_estimator": ("ppo.advantage",),
    **dict.fromkeys(("unsup_coef", "ptx_coef"), ("pretraining.coef",)),
    "enable_ema": ("ema",),
    **dict.fromkeys(("model_name_or_path", "model_name", "pretrain", "base_model"), ("model",)),
    **dict.fromkeys(("actor_model_name_or_path", "sft_model_path"), ("actor.model",)),
    **dict.fromkeys(("critic_model_name_or_path", "reward_model_path", "reward_pretrain"), ("reward.model",)),
    **dict.fromkeys(("ref_model", "ref_model_path"), ("reference.model",)),
    **dict.fromkeys(("dataset", "dataset_name", "data_path", "train_file", "prompt_data"), ("data.train",)),
    **dict.fromkeys(("eval_dataset", "eval_data"), ("data.heldout",)),
    **dict.fromkeys(("output_dir", "save_path"), ("output",)),
    "save_steps": ("save_every",),
    **dict.fromkeys(("save_total_limit", "max_ckpt_num"), ("keep_last",)),
    **dict.fromkeys(("eval_steps", "eval_interval"), ("evaluate_every",)),
    "resume_from_checkpoint": ("resume",),
    **dict.fromkeys(("dtype", "torch_dtype", "bf16", "fp16"), ("precision",)),
    **dict.fromkeys(("attn_implementation", "flash_attn"), ("attention",)),
    **dict.fromkeys(("zero_stage", "deepspeed_config"), ("deepspeed",)),
    "actor_zero_stage": ("actor.deepspeed",),
    "critic_zero_stage": ("critic.deepspeed",),
    **dict.fromkeys(("use_lora", "lora_dim", "lora_rank", "lora_r"), ("lora.rank",)),
    "lora_alpha": ("lora.alpha",),
    **dict.fromkeys(("target_modules", "lora_target_modules", "lora_module_name"), ("lora.targets",)),
    "loss_type": ("loss",),
    "packing_samples": ("packing",),
}


def explain(error: ValidationError, settings_class: type[BaseModel]) -> dict[str, str]:
    """Wrong key -> one sentence: the key, what is wrong, what to do."""
    problems: dict[str, ErrorDetails] = {}
    for problem in error.errors():
        problems.setdefault(".".join(str(part) for part in problem["loc"] if part not in UNION_BRANCHES), problem)
    known = all_keys(settings_class)
    # pydantic also reports a list whose items are wrong as too short.
    return {
        key: _sentence(key, problem, known)
        for key, problem in problems.items()
        if not (problem["type"] == "too_short" and any(other.startswith(f"{key}.") for other in problems))
    }


def _sentence(key: str, problem: ErrorDetails, known: list[str]) -> str:
    if problem["type"] == "extra_forbidden":
        if new := new_name(key, known):
            return f"key `{key}` was renamed; write `{new}`"
        near = guess(key, known)
        return f"unknown key `{key}`; " + (f"did you mean `{near}`?" if near else "remove it")
    if problem["type"] == "missing":
        return f"key `{key}` is missing; add it"
    numbers = problem.get("ctx", {})
    fix = str(numbers["error"]) if problem["type"] == "value_error" else FIXES[problem["type"]].format(**numbers)
    return f"key `{key}`: {fix}; got {json.dumps(problem['input'], default=str)}" if key else fix


def guess(key: str, known: list[str]) -> str | None:
    """The known key that an unknown one was meant to be: another tool's name of it, its name in another group, or a
    spelling close to it."""
    path = [part for part in key.split(".") if not part.isdigit()]
    for name in (*OTHER_TOOLS.get(path[-1].lower().replace("-", "_"), ()), path[-1]):
        same = [other for other in known if f".{other}".endswith(f".{name}")]
        if same:
            return max(same, key=lambda other: len(os.path.commonprefix([other, key])))
    names = {name: other for other in reversed(known) for name in (other, other.rpartition(".")[2])}
    near = [name for word in (".".join(path), path[-1]) for name in difflib.get_close_matches(word, names, 1, CUTOFF)]
    return names[near[0]] if near else None


def all_keys(settings_class: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of the settings, with dots."""
    keys = []
    for name, field in settings_class.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += all_keys(kind, f"{prefix}{name}.")
    return keys
