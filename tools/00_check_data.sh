#!/usr/bin/env bash
# Before all else: reads every image, tag and mask once; ends with what has to be mended.
#   bash tools/00_check_data.sh --config configs/voc.yaml [any key of it, such as --seed 1]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh
exec .venv/bin/python tools/data/check_data.py "$@"
