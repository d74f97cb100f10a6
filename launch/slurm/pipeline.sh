#!/usr/bin/env bash
# The three steps of a recipe as Slurm jobs, each after the success of the one before; finished steps are left out.
#   bash launch/slurm/pipeline.sh CONFIG_DIR OUT [sbatch options, such as --nodes=2] [key=value that all three steps have]
set -euo pipefail
if [[ $# -lt 2 || "$1" == -* || "$2" == -* ]]; then
    echo "usage: bash $0 CONFIG_DIR OUT [sbatch options] [key=value]" >&2
    exit 2
fi
folder="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck disable=SC1091
source "$folder/../common.sh"
export TRISTAGE="${TRISTAGE:-$(cd "$folder/../.." && pwd)}"
configs="$1" out="$2"
shift 2
options=() settings=() after=""
for word in "$@"; do
    if [[ "$word" == -* ]]; then options+=("$word"); else settings+=("$word"); fi
done

# is_finished STEP [key=value ...]: whether its output holds what a run with these settings wrote to its end. Ends this
# script when another run has finished there.
is_finished() {
    local step="$1" status=0
    shift
    [[ -e "$out/$step/finished.json" ]] || return 1
    python -m tristage.runs.finished "$step.train" "$configs/$step.yaml" "output=$out/$step" "$@" || status=$?
    case "$status" in 0) return 0 ;; 3) return 1 ;; *) exit 2 ;; esac
}

# check STEP [key=value ...]: a mistake in a config is reported before the first job waits in the queue.
check() {
    local step="$1"
    shift
    python -m tristage.launch.check_config --models-later "$step.train" "$configs/$step.yaml" "output=$out/$step" "$@" \
        "${settings[@]}" || exit 2
}

# submit STEP [key=value ...]: after the job before, if there is one. A finished step is left out unless one before it
# runs again: it then checks in its job that what it read is as it was.
submit() {
    local step="$1" dependency=()
    shift
    if [[ -z "$after" ]] && is_finished "$step" "$@" "${settings[@]}"; then
        echo "$step: already finished ($out/$step/final)"
        return
    fi
    if [[ -n "$after" ]]; then dependency=("--dependency=afterok:$after" --kill-on-invalid-dep=yes); fi
    after="$(sbatch --parsable "${dependency[@]}" "${options[@]}" "$folder/$step.sbatch" "$configs/$step.yaml" \
        "output=$out/$step" "$@" "${settings[@]}")"
    after="${after%%;*}" # "ID;CLUSTER"
    echo "$step: job $after"
}

starts=("actor.model=$out/step1_sft/final" "reward.model=$out/step2_reward_model/final")
check step1_sft
check step2_reward_model
check step3_ppo "${starts[@]}"
submit step1_sft
submit step2_reward_model
submit step3_ppo "${starts[@]}"
