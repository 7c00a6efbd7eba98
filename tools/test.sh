#!/usr/bin/env bash
# Lint and tests, with their own set-up; writes nothing into the tree but .venv.
set -euo pipefail

speed=(-m 'not slow')
coverage=()
select=()
for arg in "$@"; do
  case $arg in
    -h | --help)
      cat <<'HELP'
Usage: bash tools/test.sh [--all] [--coverage] [pytest arguments]

Sets up .venv on the first call, then: ruff check, ruff format --check, pytest on two workers.

  --all        also the tests marked slow
  --coverage   also count the lines of core/ that the tests run: a third slower; fails below 90 %
  others       go to pytest, for example tests/test_debias.py -k alpha
HELP
      exit 0
      ;;
    --all) speed=() ;;
    --coverage) coverage=(--cov --cov-report=term --cov-fail-under=90) ;;
    *) select+=("$arg") ;;
  esac
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/tools/setup.sh" --dev --optional
cd "$root"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Compiled code and the list of fonts are kept in .venv, for the next run and for the demo.
export PYTHONDONTWRITEBYTECODE='' PYTHONPYCACHEPREFIX=$root/.venv/pycache
export NUMBA_CACHE_DIR=$root/.venv/numba-cache MPLCONFIGDIR=$root/.venv/matplotlib
export COVERAGE_FILE=$scratch/coverage HYPOTHESIS_STORAGE_DIRECTORY=$scratch/hypothesis
export OMP_NUM_THREADS=1 # the workers already fill the cores

python=.venv/bin/python

"$python" -m ruff check --no-cache .
"$python" -m ruff format --no-cache --check .
# Bash 3.2 (macOS) calls an empty array unset: hence ${a[@]+...}.
rc=0
"$python" -m pytest -q -p no:cacheprovider -n 2 --dist loadgroup ${speed[@]+"${speed[@]}"} \
  ${coverage[@]+"${coverage[@]}"} ${select[@]+"${select[@]}"} || rc=$?
echo "$SECONDS s with set-up and lint"
exit $rc
