#!/usr/bin/env bash
# Stage 3: debiased labels, in <run_dir>/debias/labels/; biased pixels are 254.
#   bash tools/03_make_debiased_labels.sh --config configs/voc.yaml [any of its keys, such as --seed 1]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh
exec .venv/bin/python make_debiased_labels.py "$@"
