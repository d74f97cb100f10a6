#!/usr/bin/env bash
# The three steps of a recipe, each starting from the folders of the ones before. Finished steps are skipped, one that
# was stopped goes on; at the end it says what each reached.
#   bash launch/pipeline.sh CONFIG_DIR OUT [launcher options, key=value that all three steps have]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
if [[ $# -lt 2 ]]; then
    echo "usage: bash $0 CONFIG_DIR OUT [launcher options, key=value]" >&2
    exit 2
fi
configs="$1" out="$2"
shift 2
sft="$out/step1_sft" reward="$out/step2_reward_model" ppo="$out/step3_ppo"
steps() {
    run_step "step 1" step1_sft.train "$configs/step1_sft.yaml" "$sft" "$@"
    run_step "step 2" step2_reward_model.train "$configs/step2_reward_model.yaml" "$reward" "$@"
    run_step "step 3" step3_ppo.train "$configs/step3_ppo.yaml" "$ppo" \
        "actor.model=$sft/final" "reward.model=$reward/final" "$@"
}
CHECK_ONLY=yes steps "$@" # a mistake in step 3's config is told before step 1 trains
steps "$@"
python -m tristage.launch.dry_run summary "$out"
