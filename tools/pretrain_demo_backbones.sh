#!/usr/bin/env bash
# Makes data/demo/*.safetensors from scratch in about half an hour on two cores; can be resumed.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh
export OMP_NUM_THREADS=1
python=.venv/bin/python
"$python" tools/data/make_demo_dataset.py --root data/demo_corpus --corpus --train 16000 --val 500
"$python" train_uss.py --config configs/demo_corpus.yaml &
features=$!
"$python" train_wsss.py --config configs/demo_corpus.yaml --classifier-only
wait "$features"
"$python" tools/export_backbone.py runs/demo_corpus/uss/checkpoint.pth data/demo/features.safetensors
"$python" tools/export_backbone.py runs/demo_corpus/wsss/checkpoint.pth data/demo/classifier.safetensors
