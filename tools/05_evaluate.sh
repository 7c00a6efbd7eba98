#!/usr/bin/env bash
# Stage 5: mIoU, FP and FN, in <run_dir>/evaluation/<mode>/scores.json.
#   bash tools/05_evaluate.sh --config configs/voc.yaml [any of its keys, such as --seed 1]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh
exec .venv/bin/python evaluate.py "$@"
