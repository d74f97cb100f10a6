"""The map from DeepSpeed-Chat spells out each of its flags and scripts, and names keys that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from step1_sft.config import SFTConfig
from step2_dpo.config import DPOConfig
from step2_reward_model.config import RewardModelConfig
from step3_ppo.config import PPOConfig
from tristage.config import load_config
from tristage.config.problems import all_keys

REPO = Path(__file__).parents[2]
MAP = (REPO / "docs/from-deepspeed-chat.md").read_text()
KEYS = {key for step in (SFTConfig, RewardModelConfig, DPOConfig, PPOConfig) for key in all_keys(step)}
KEYS |= {key.rpartition(".")[2] for key in KEYS}  # `schedule` of each optimizer
KEYS |= {"path", "name", "lora.alpha: 1", "reference: null"}
SHARED = """data_path data_split data_output_path seed local_rank output_dir dtype add_eot_token compute_fp32_loss
enable_tensorboard tensorboard_path num_train_epochs gradient_accumulation_steps lr_scheduler_type num_warmup_steps
only_optimize_lora offload num_padding_at_beginning"""
OF_ONE_MODEL = """sft_only_data_path model_name_or_path per_device_train_batch_size per_device_eval_batch_size
max_seq_len learning_rate weight_decay gradient_checkpointing dropout zero_stage lora_dim lora_module_name
lora_learning_rate eot_token print_loss eval_interval eval_iters beta label_smoothing offload_reference_model"""
OF_PPO = """unsupervised_dataset_name unsupervised_dataset_config_name unsup_coef per_device_generation_batch_size
per_device_training_batch_size generation_batches ppo_epochs max_prompt_seq_len max_answer_seq_len
preprocessing_num_workers enable_hybrid_engine unpin_actor_parameters release_inference_cache inference_tp_size
tp_gather_partition_size offload_reward_model enable_ema enable_mixed_precision_lora align_overflow print_answers
print_answers_interval enable_test_mode test_stop_step"""
OF_ACTOR_AND_CRITIC = """model_name_or_path learning_rate weight_decay zero_stage gradient_checkpointing dropout
lora_dim lora_module_name lora_learning_rate"""
FLAGS = [f"--{flag}" for flag in f"{SHARED} {OF_ONE_MODEL} {OF_PPO}".split()]
FLAGS += [f"--{model}_{flag}" for flag in OF_ACTOR_AND_CRITIC.split() for model in ("actor", "critic")]
SCRIPTS = ("e2e_rlhf.py", "chat.py", "run_prompt.sh", "prompt_eval.py", "rw_eval.py", "run_eval.sh")


@pytest.mark.parametrize("word", [*FLAGS, *SCRIPTS])
def test_a_flag_or_script_is_spelt_out(word: str) -> None:
    assert re.search(rf"`[^`]*(?<![\w-]){re.escape(word)}`", MAP)


def test_the_map_names_keys_that_exist() -> None:
    rows = [line.split("|") for line in MAP.splitlines() if line.startswith("| `--")]
    named = [word for row in rows for word in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:: [^`]*)?`", row[2])]
    assert len(rows) > 50 and len(named) > 40
    assert {key for key in named if key not in KEYS} == set()


def test_the_recipe_of_the_script_that_averages_weights_does_too() -> None:
    settings = load_config(PPOConfig, ["--config", str(REPO / "configs/opt-1.3b/step3_ppo.yaml")])
    assert settings.ema is not None and (settings.ema.decay, settings.ema.start) == (0.992, 0.0)
