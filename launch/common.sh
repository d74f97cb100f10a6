# What the launchers share. Sourced, not run: `source "$(dirname "${BASH_SOURCE[0]}")/common.sh"`.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# Compiled ops go to a folder of this checkout: a half-built op elsewhere can make every later run hang.
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
