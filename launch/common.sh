# What the launchers share. Sourced, not run: `source "$(dirname "${BASH_SOURCE[0]}")/common.sh"`.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# Compiled ops go to a folder of this checkout: a half-built op elsewhere can make every later run wait for ever.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$ROOT/.torch_extensions}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

# Use the active virtual environment, else make and use .venv; install what constraints.txt pins. $1: extras.
ensure_environment() {
    local extras="${1:-}" stamp
    if [[ -z "${VIRTUAL_ENV:-}" ]]; then
        if [[ ! -x "$ROOT/.venv/bin/python" ]]; then
            echo "making a virtual environment in $ROOT/.venv"
            python3 -c 'import sys; sys.exit("tristage needs python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
            python3 -m venv "$ROOT/.venv"
        fi
        # shellcheck disable=SC1091
        source "$ROOT/.venv/bin/activate"
    fi
    stamp="$VIRTUAL_ENV/.tristage$extras-$(cat "$ROOT/constraints.txt" "$ROOT/setup.cfg" | cksum | cut -d' ' -f1)"
    if [[ ! -e "$stamp" ]]; then
        echo "installing into $VIRTUAL_ENV (minutes, once)"
        pip install --quiet --disable-pip-version-check -c "$ROOT/constraints.txt" -e "$ROOT$extras"
        touch "$stamp"
    fi
}

# Without a GPU DeepSpeed compiles a small op on first use; do it here, once, and say so.
build_cpu_op() {
    if has_gpu; then return; fi
    if ! { mkdir -p "$TORCH_EXTENSIONS_DIR" && : >>"$TORCH_EXTENSIONS_DIR/.builder"; } 2>/dev/null; then
        echo "error: $TORCH_EXTENSIONS_DIR cannot be written; set TORCH_EXTENSIONS_DIR to a folder that can" >&2
        exit 2
    fi
    (
        flock 9
        # Ranks hold `lock` for a moment when they load the op: an old one is left over from a killed run.
        find "$TORCH_EXTENSIONS_DIR" -name lock -mmin +5 -delete
        if find "$TORCH_EXTENSIONS_DIR" -name deepspeed_shm_comm.so | grep -q .; then exit 0; fi
        # No op yet, and whoever holds the flock is the only builder: a `lock` is left over from a killed build.
        find "$TORCH_EXTENSIONS_DIR" -name lock -delete
        echo "compiling DeepSpeed's CPU communication op (about a minute, once)"
        export DS_ACCELERATOR=cpu
        if ! python -c 'from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load(verbose=False)' \
            >"$TORCH_EXTENSIONS_DIR/build.log" 2>&1; then
            tail -n 20 "$TORCH_EXTENSIONS_DIR/build.log" >&2
            echo "error: DeepSpeed's CPU op did not compile; install a C++ compiler (g++)" >&2
            exit 1
        fi
    ) 9>"$TORCH_EXTENSIONS_DIR/.builder"
}

# Whether ranks will run on GPUs; asked once, for importing torch takes seconds.
has_gpu() {
    if [[ -z "${HAS_GPU:-}" ]]; then
        HAS_GPU=no
        if [[ "${DS_ACCELERATOR:-}" != cpu ]] && python -m tristage.dist.gpu; then
            HAS_GPU=yes
        fi
    fi
    [[ "$HAS_GPU" == yes ]]
}

# Pids of this run on this machine, DeepSpeed's launcher included: all inherit the variable.
run_pids() { grep -lszxF "PYTHON_TRISTAGE_RUN=$RUN_MARK" /proc/[0-9]*/environ | cut -d/ -f3 || true; }

# Those of them that are ranks, of module $1.
rank_pids() {
    local pid
    for pid in $(run_pids); do
        if tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q -- " -u -m $1 "; then echo "$pid"; fi
    done
}

kill_all() {
    # shellcheck disable=SC2046
    kill "$1" $(run_pids) 2>/dev/null || true
    on_nodes "kill $1 \$(grep -lszxF 'PYTHON_TRISTAGE_RUN=$RUN_MARK' /proc/[0-9]*/environ | cut -d/ -f3)"
}

# A command on every node of a hostfile, which is not waited for long and may fail.
on_nodes() {
    local node pids=()
    [[ -e "$RUN_MARK/nodes" ]] || return 0
    while read -r node; do
        timeout 15 ssh -o BatchMode=yes -o ConnectTimeout=5 "$node" "$1" </dev/null >/dev/null 2>&1 &
        pids+=($!)
    done <"$RUN_MARK/nodes"
    wait "${pids[@]}" || true
}

# DeepSpeed's launcher reports any exit code but 0 as an error. 2 and 75 are ends that the ranks have explained.
without_handled_end() {
    LC_ALL=C grep --line-buffered -av '\[ERROR\].*:sigkill_handler\].* exits with return code = \(2\|75\)$' || true
}

# With several nodes: what ranks say on standard error goes on, and the exit code of the first node that fails is kept.
# DeepSpeed and pdsh would wait for the others, whose ranks may wait for those that are gone.
note_first_failure() {
    local line
    while IFS= read -r line || [[ -n "$line" ]]; do
        printf '%s\n' "$line"
        if [[ "$line" =~ ^pdsh@.*:\ ssh\ exited\ with\ exit\ code\ ([0-9]+)$ && ! -e "$RUN_MARK/first" ]]; then
            echo "${BASH_REMATCH[1]}" >"$RUN_MARK/first"
        fi
    done
}

# Ends what is left of a run on all nodes some time after one has failed: ranks that save, or say what is wrong, are done.
end_after_failure() {
    local seconds=0
    while [[ -d "$RUN_MARK" && "$seconds" -lt 30 ]]; do
        sleep 1
        [[ ! -e "$RUN_MARK/first" ]] || seconds=$((seconds + 1))
    done
    [[ ! -d "$RUN_MARK" ]] || kill_all -KILL
}

# A signal to this shell, from a terminal, a scheduler or a user: the first asks the ranks to end after their step, which
# DeepSpeed's launcher would not let them (it kills them), the second ends everything. $1: its name, $2: the module.
on_signal() {
    local ranks
    INTERRUPTED=yes
    if [[ -n "$STOPPED_BY" ]]; then
        kill_all -KILL
    else
        STOPPED_BY="$1"
        echo "SIG$1: ending after this step, with a checkpoint (a second signal ends at once)" >&2
        ranks="$(rank_pids "$2")"
        # shellcheck disable=SC2086
        if [[ -n "$ranks" ]]; then kill -TERM $ranks 2>/dev/null || true; else kill_all -TERM; fi
    fi
}

# run_deepspeed MODULE CONFIG [key=value ...] -- [options]: one start of the ranks, to the end of the last; the exit code.
run_deepspeed() {
    local module="$1" command=() log port status=0 second child tees=() after="" name seconds=0
    RUN_MARK="$(mktemp -d "${TMPDIR:-/tmp}/tristage.XXXXXX")"
    STOPPED_BY="" PORT_TAKEN=no
    # The name starts with PYTHON because DeepSpeed hands such variables on to other nodes.
    if ! PYTHON_TRISTAGE_RUN="$RUN_MARK" python -m tristage.launch.prepare "$RUN_MARK" "$@"; then
        rm -rf "$RUN_MARK"
        return 2
    fi
    mapfile -d '' -t command <"$RUN_MARK/command"
    log="$(cat "$RUN_MARK/log")" port="$(cat "$RUN_MARK/port" 2>/dev/null || echo none)"
    if ! { mkdir -p "$(dirname "$log")" && echo "$(date '+%F %T') deepspeed ${command[*]@Q}" >>"$log"; } 2>/dev/null; then
        log=/dev/null # also where the config does not say its output; the step will say so
    fi
    for name in TERM INT USR1 HUP; do
        # shellcheck disable=SC2064
        trap "on_signal $name $module" "$name"
    done
    # What ranks say goes to the terminal and to the log; the pipes outlive signals, and are waited for.
    mkfifo "$RUN_MARK/out" "$RUN_MARK/err"
    (trap '' TERM INT USR1 HUP; without_handled_end <"$RUN_MARK/out" | exec tee -a "$log") & tees+=($!)
    (trap '' TERM INT USR1 HUP; tee -a "$log" <"$RUN_MARK/err" | note_first_failure >&2) & tees+=($!)
    if [[ -e "$RUN_MARK/nodes" ]]; then
        (trap '' TERM INT USR1 HUP; end_after_failure) >/dev/null 2>&1 & after=$!
    fi
    # In a session of its own, out of reach of a terminal's Ctrl-C and of signals to this process group.
    (
        trap '' USR1
        export PYTHON_TRISTAGE_RUN="$RUN_MARK"
        if [[ -e "$RUN_MARK/env" ]]; then
            export DS_ENV_FILE="$RUN_MARK/env"
            # Without signs of life pdsh would wait for a lost node for ever.
            export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
            for name in "${!MLFLOW@}"; do unset "$name"; done # DeepSpeed would pass them on unquoted
        fi
        exec setsid deepspeed --log_level error --no_local_rank "${command[@]}" >"$RUN_MARK/out" 2>"$RUN_MARK/err"
    ) &
    child=$!
    while INTERRUPTED=no; do
        second=0
        wait "$child" 2>/dev/null || second=$? # bash would say "Killed", with all that was
        [[ "$second" == 127 ]] || status="$second"
        [[ "$INTERRUPTED" == yes ]] || break
    done
    # A signal that was sent to every process ended the launcher, but not the ranks, which save.
    while [[ -n "$STOPPED_BY" && -n "$(run_pids)" && "$seconds" -lt 60 ]]; do
        sleep 1 || true
        seconds=$((seconds + 1))
    done
    kill_all -KILL
    wait "${tees[@]}" || true
    if [[ -e "$RUN_MARK/first" ]]; then status="$(cat "$RUN_MARK/first")"; fi
    trap - TERM INT USR1 HUP
    if [[ -n "$STOPPED_BY" && "$status" != 0 ]]; then
        # 143, 241 (-15): ranks that had not got so far as to handle the signal.
        if [[ -e "$RUN_MARK/preempted" || "$status" == 143 || "$status" == 241 ]]; then status=75; fi
    fi
    if [[ -e "$RUN_MARK/port_taken" ]]; then PORT_TAKEN=yes; fi
    rm -rf "$RUN_MARK"
    [[ -z "$after" ]] || wait "$after" || true
    # A killed rank leaves DeepSpeed's buffer in shared memory (dist.shutdown removes it otherwise).
    [[ ! "$port" =~ ^[0-9]+$ ]] || rm -f "/dev/shm/deepspeed_allreduce_buffer_$(id -u)_"*"_${port}_"*
    return "$status"
}

# launch_step MODULE CONFIG [key=value ...] [--cpu N | --num-gpus N | --hostfile F] [--dry-run] [--max-restarts N]
#     [other options of the deepspeed launcher]
launch_step() {
    local module="$1" options=() settings=() word restarts=0 dry=no
    shift
    if [[ $# -eq 0 || "$1" == -* ]]; then
        echo "usage: bash $0 CONFIG [key=value ...] [--hostfile F | --num-gpus N | --cpu N] [--dry-run]" \
            "[--max-restarts N] [deepspeed launcher options]" >&2
        exit 2
    fi
    local config="$1"
    shift
    # A word after a --option belongs to it unless it is another option or a key=value.
    local after_option=no
    for word in "$@"; do
        case "$word" in
            --cpu | --cpu=*) word="--num_gpus${word#--cpu}" HAS_GPU=no ;;
            --num-gpus | --num-gpus=*) word="--num_gpus${word#--num-gpus}" ;;
        esac
        if [[ "$after_option" == restarts ]]; then
            restarts="$word" after_option=no
        elif [[ "$word" == --max-restarts ]]; then
            restarts="" after_option=restarts
        elif [[ "$word" == --max-restarts=* ]]; then
            restarts="${word#*=}" after_option=no
        elif [[ "$word" == --dry-run ]]; then
            dry=yes after_option=no
        elif [[ "$word" == -* ]]; then
            options+=("$word")
            [[ "$word" == *=* ]] && after_option=no || after_option=yes
        elif [[ "$after_option" == yes && "$word" != *=* ]]; then
            options+=("$word")
            after_option=no
        else
            settings+=("$word")
            after_option=no
        fi
    done
    if [[ ! "$restarts" =~ ^[0-9]+$ ]]; then
        echo "error: --max-restarts needs a number" >&2
        exit 2
    fi
    local leave_out=()
    if [[ -n "${CHECK_ONLY:-}" ]]; then leave_out=(--models-later); fi
    if [[ "$dry" == yes ]]; then leave_out=(--elsewhere); fi
    python -m tristage.launch.check_config "${leave_out[@]}" "$module" "$config" "${settings[@]}" -- "${options[@]}" || exit 2
    if [[ -n "${CHECK_ONLY:-}" ]]; then return; fi
    local given=" ${options[*]-} "
    if ! has_gpu; then
        [[ "$dry" == yes ]] || build_cpu_op
        export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
        [[ "$given" =~ \ (--(num_gpus|num_accelerators|hostfile|include|exclude)|-[Hie]\ ) ]] || options+=(--num_gpus 2)
    fi
    if [[ "$dry" == yes ]]; then
        python -m tristage.launch.dry_run "$module" "$config" "${settings[@]}" -- "${options[@]}"
        return
    fi
    local status restart=0 pick=1
    while true; do
        status=0
        run_deepspeed "$module" "$config" "${settings[@]}" -- "${options[@]}" || status=$?
        # The launcher picked a port that another process took before the ranks met: pick again.
        if [[ "$PORT_TAKEN" == yes && -z "$STOPPED_BY" && "$pick" -lt 5 ]]; then
            pick=$((pick + 1))
            continue
        fi
        # Not after success, what the user has to mend, or a signal; a scheduler starts again after 75.
        case "$status" in 0 | 2 | 75) return "$status" ;; esac
        if [[ -n "$STOPPED_BY" || "$restart" -ge "$restarts" ]]; then return "$status"; fi
        restart=$((restart + 1))
        echo "exit code $status: restart $restart of at most $restarts" >&2
    done
}

# is_finished MODULE CONFIG OUT ...: whether OUT holds what a run with these settings wrote to its end. Ends the launcher
# when another run has finished there. With CHECK_ONLY set, model folders may still change and are not compared.
is_finished() {
    local module="$1" config="$2" out="$3" status=0 later=()
    shift 3
    [[ -e "$out/finished.json" ]] || return 1
    if [[ -n "${CHECK_ONLY:-}" ]]; then later=(--models-later); fi
    python -m tristage.runs.finished "${later[@]}" "$module" "$config" "output=$out" "$@" || status=$?
    case "$status" in 0) return 0 ;; 3) return 1 ;; *) exit 2 ;; esac
}

# run_step NAME MODULE CONFIG OUT ...: launch_step, unless the step is finished. With CHECK_ONLY set its config is looked
# at and nothing else is done.
run_step() {
    local name="$1" module="$2" config="$3" out="$4"
    shift 4
    if is_finished "$module" "$config" "$out" "$@"; then
        [[ -n "${CHECK_ONLY:-}" ]] || echo "$name: already finished ($out/final)"
    else
        launch_step "$module" "$config" "output=$out" "$@"
    fi
}
