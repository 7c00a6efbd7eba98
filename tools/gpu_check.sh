#!/usr/bin/env bash
# Real-size networks with random weights on this machine's GPU: does every one train and predict, how
# fast, in how much memory. docs/gpu.md keeps what it printed. Needs no data set and no network.
#   bash tools/gpu_check.sh [cases and options of tools/bench/full_size.py]
# PYTHON=python3 uses an interpreter that has the packages already, instead of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z ${PYTHON:-} ]]; then
  bash tools/setup.sh
  PYTHON=.venv/bin/python
fi
exec "$PYTHON" tools/bench/full_size.py "$@"
