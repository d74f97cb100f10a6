# What the Slurm jobs share. Sourced from a job: `source "${TRISTAGE:-$SLURM_SUBMIT_DIR}/launch/slurm/common.sh"`.
set -euo pipefail

# Slurm runs a copy of the job's file: the repository is where the job was submitted from, or $TRISTAGE.
SLURM_FOLDER="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck disable=SC1091
source "$SLURM_FOLDER/../common.sh"

# slurm_step MODULE CONFIG [key=value ...]: one rank per task of this job. Exit code 75, after a signal that announces the
# end of the job's time or a preemption, requeues the job; it then resumes from its checkpoint.
slurm_step() {
    local module="$1" status=0 wait_status child device
    shift
    if [[ $# -eq 0 || "$1" == -* ]]; then
        echo "usage: sbatch launch/slurm/NAME.sbatch CONFIG [key=value ...]" >&2
        exit 2
    fi
    local config="$1"
    shift
    MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    # Jobs that share a node meet at different ports.
    export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
    python -m tristage.launch.check_config "$module" "$config" "$@" || exit 2
    device="$(python -m tristage.launch.cpu_op)" || exit 2
    if [[ "$device" == cpu ]]; then
        export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    fi
    # When one rank ends, srun must not end the others: they notice it themselves, and report what happened. After a
    # signal all end with 75, which srun would hide by killing the slower ones.
    srun --kill-on-bad-exit=0 --wait=60 bash "$SLURM_FOLDER/rank.sh" "$module" --config "$config" "$@" &
    child=$!
    trap 'kill -USR1 "$child" 2>/dev/null || true' USR1 TERM
    while true; do
        wait_status=0
        wait "$child" || wait_status=$?
        [[ "$wait_status" == 127 ]] || status="$wait_status"
        kill -0 "$child" 2>/dev/null || break
    done
    trap - USR1 TERM
    # 138: the signal (128 + 10) came before ranks could handle it; they had done nothing yet.
    if [[ "$status" == 138 ]]; then status=75; fi
    if [[ "$status" == 75 ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
    exit "$status"
}
