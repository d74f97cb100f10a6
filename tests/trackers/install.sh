#!/usr/bin/env bash
# The environment of the tests with real experiment trackers, whose dependencies the project does not share. Without it
# those tests are skipped, and say so. TRISTAGE_TRACKERS_ENV is its folder.
set -euo pipefail
folder="${TRISTAGE_TRACKERS_ENV:-${XDG_CACHE_HOME:-$HOME/.cache}/tristage/trackers}"
if [[ -f "$folder/complete" ]]; then exit; fi
python -m venv --clear "$folder"
"$folder/bin/pip" install --quiet --quiet --disable-pip-version-check \
    wandb==0.31.0 mlflow-skinny==3.17.2 trackio==0.43.0 pyyaml
touch "$folder/complete"
