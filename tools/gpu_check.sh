#!/usr/bin/env bash
# This machine's GPU: first the tests marked gpu, in which tiny networks train, resume and label as
# on the CPU; then full-size networks with random weights: whether each of them trains and predicts,
# how fast and in how much memory. Puts the tables into docs/gpu.md. Needs no data and no network.
#   bash tools/gpu_check.sh [cases and options of tools/bench/full_size.py]
# PYTHON=python3 uses an interpreter that already has the packages (pytest, too) instead of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z ${PYTHON:-} ]]; then
  bash tools/setup.sh --dev
  PYTHON=.venv/bin/python
fi
rc=0
"$PYTHON" -m pytest -q -p no:cacheprovider -m gpu || rc=$?
"$PYTHON" tools/bench/full_size.py --output docs/gpu.md "$@"
exit $rc
