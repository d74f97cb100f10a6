#!/usr/bin/env bash
# The three steps of a recipe, each starting from the folders of the ones before. Finished steps are skipped, a
# stopped step resumes; at the end it prints the metrics of each.
#   bash launch/pipeline.sh CONFIG_DIR OUT [launcher options, key=value that all three steps have]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
exec python -m tristage.launch.pipeline "$@"
