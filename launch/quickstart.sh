#!/usr/bin/env bash
# From a bare clone to a table that shows RLHF working: environment, a made-up task, three steps, evaluation.
#   bash launch/quickstart.sh [OUT] [SEED]        OUT: output/quickstart      a second run goes on where it stopped
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
out="${1:-$ROOT/output/quickstart}" seed="${2:-0}" configs="${CONFIGS:-$ROOT/configs/quickstart}" size="${SIZE:-small}"
ensure_environment
build_cpu_op
python -m tristage.quickstart.prepare "$out" --seed "$seed" --size "$size"
sft="$out/step1_sft" reward="$out/step2_reward_model" ppo="$out/step3_ppo" data="$out/data"
run_step "step 1" step1_sft.train "$configs/step1_sft.yaml" "$sft" "seed=$seed" "model=$out/model" \
    "data.train=$data/sft.train.jsonl" "data.heldout=$data/sft.heldout.jsonl"
run_step "step 2" step2_reward_model.train "$configs/step2_reward_model.yaml" "$reward" "seed=$seed" \
    "model=$sft/final" "data.train=$data/preference.train.jsonl" "data.heldout=$data/preference.heldout.jsonl"
run_step "step 3" step3_ppo.train "$configs/step3_ppo.yaml" "$ppo" "seed=$seed" \
    "actor.model=$sft/final" "reward.model=$reward/final" \
    "data.train=$data/prompts.train.jsonl" "data.heldout=$data/prompts.heldout.jsonl"
python -m tristage.quickstart.report "$out"
