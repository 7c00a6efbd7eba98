#!/usr/bin/env bash
# Stage 2: a classifier on image tags and its pseudo labels, in <run_dir>/wsss/labels/.
#   bash tools/02_train_wsss.sh --config configs/voc.yaml [any of its keys, such as --seed 1]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh
exec .venv/bin/python train_wsss.py "$@"
