#!/usr/bin/env bash
# The whole method on the built-in benchmark: prints a table and writes runs/demo/report.html.
set -euo pipefail

for arg in "$@"; do
  if [[ $arg == -h || $arg == --help ]]; then
    cat <<'HELP'
Usage: bash tools/demo.sh [--quick] [--seed N] [--run-dir DIR] [--jobs N]

Sets up .venv on the first call, draws the benchmark's images, runs the five stages on them
(CPU is enough), prints the table and writes a page of pictures and numbers.

  --quick        smaller and faster: shows that everything runs, not how well
  --seed N       another benchmark and other initial weights (default: 0)
  --run-dir DIR  folder of the results; a relative path starts at the clone
                 (default: runs/demo, with _quick and _seedN if these are given)
  --jobs N       commands at a time (default: one per core)

PYTHON=python3.12 bash tools/demo.sh   chooses the interpreter (3.10 to 3.14) for .venv
An interrupted demo continues where it was.
HELP
    exit 0
  fi
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/tools/setup.sh"
cd "$root"
# Compiled code is kept in .venv, for the next run and for the tests.
export PYTHONDONTWRITEBYTECODE='' PYTHONPYCACHEPREFIX=$root/.venv/pycache
export NUMBA_CACHE_DIR=$root/.venv/numba-cache
exec .venv/bin/python tools/demo/run_demo.py "$@"
