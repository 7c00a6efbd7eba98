#!/usr/bin/env bash
# Stage 1: unsupervised semantic features, in <run_dir>/uss/checkpoint.pth.
#   bash tools/01_train_uss.sh --config configs/voc.yaml [any of its keys, such as --seed 1]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh
exec .venv/bin/python train_uss.py "$@"
