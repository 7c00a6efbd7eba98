#!/usr/bin/env bash
# Before the stages: reads every image, tag and mask once, and lists all problems.
#   bash tools/00_check_data.sh --config configs/voc.yaml [any of its keys, such as --seed 1]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh
exec .venv/bin/python tools/data/check_data.py "$@"
