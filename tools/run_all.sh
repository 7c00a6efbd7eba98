#!/usr/bin/env bash
# Checks the data, then runs the five stages; each continues where it was stopped.
#   bash tools/run_all.sh --config configs/voc.yaml [any of its keys, such as --seed 1]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for script in tools/0[0-5]_*.sh; do
  printf '== %s\n' "$script"
  bash "$script" "$@"
done
