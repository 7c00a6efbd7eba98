#!/usr/bin/env bash
# Full-size networks with random weights on this machine's GPU: whether each of them trains and
# predicts, how fast and in how much memory; docs/gpu.md has its output. Needs no data and no network.
#   bash tools/gpu_check.sh [cases and options of tools/bench/full_size.py]
# PYTHON=python3 uses an interpreter that already has the packages instead of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z ${PYTHON:-} ]]; then
  bash tools/setup.sh
  PYTHON=.venv/bin/python
fi
exec "$PYTHON" tools/bench/full_size.py "$@"
