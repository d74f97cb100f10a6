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
    mkdir -p "$TORCH_EXTENSIONS_DIR"
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
        if [[ "${DS_ACCELERATOR:-}" != cpu ]] && python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
            HAS_GPU=yes
        fi
    fi
    [[ "$HAS_GPU" == yes ]]
}

# launch_step MODULE CONFIG [key=value ...] [deepspeed launcher options]
launch_step() {
    local module="$1" options=() settings=() word
    shift
    if [[ $# -eq 0 || "$1" == -* ]]; then
        echo "usage: bash $0 CONFIG [key=value ...] [deepspeed launcher options]" >&2
        exit 2
    fi
    local config="$1"
    shift
    # A word after a --option belongs to it unless it is another option or a key=value.
    local after_option=no
    for word in "$@"; do
        if [[ "$word" == -* ]]; then
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
    local given=" ${options[*]-} "
    if ! has_gpu; then
        build_cpu_op
        export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
        [[ "$given" =~ \ (--(num_gpus|num_accelerators|hostfile|include|exclude)|-[Hie]\ ) ]] || options+=(--num_gpus 2)
    fi
    local port=none
    if [[ ! "$given" =~ \ (--(master_port|hostfile)|-H\ ) ]]; then
        port="$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
        options+=(--master_port "$port")
    fi
    local status=0
    deepspeed --log_level error --no_local_rank "${options[@]}" --module "$module" --config "$config" "${settings[@]}" || status=$?
    # A killed rank leaves DeepSpeed's buffer in shared memory (dist.shutdown removes it otherwise).
    [[ "$port" == none ]] || rm -f "/dev/shm/deepspeed_allreduce_buffer_$(id -u)_"*"_${port}_"*
    return "$status"
}

# run_step NAME MODULE CONFIG OUT ...: launch_step, unless OUT/final says that the step is finished.
run_step() {
    local name="$1" module="$2" config="$3" out="$4"
    shift 4
    if [[ -e "$out/final/config.json" ]]; then
        echo "$name: already finished ($out/final)"
    else
        launch_step "$module" "$config" "output=$out" "$@"
    fi
}
