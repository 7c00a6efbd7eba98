#!/usr/bin/env bash
# Stage 4: the segmenter and its EMA teacher, in <run_dir>/segmentation/<mode>/.
#   bash tools/04_train_segmentation.sh --config configs/voc.yaml [any of its keys, such as --seed 1]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh
exec .venv/bin/python train_segmentation.py "$@"
