#!/usr/bin/env bash
# The paper's tables and figures from one command; finished jobs are not run again.
set -euo pipefail

for arg in "$@"; do
  if [[ $arg == -h || $arg == --help ]]; then
    cat <<'HELP'
Usage: bash tools/reproduce.sh demo|voc|coco|photos [--seeds N ...] [--only NAME ...] [--jobs N] [--quick]

  demo    Tables 4 to 6 and Figs. 8 to 10 on the built-in benchmark; about an hour per seed on two
          CPU cores, three quarters of it for Tables 4 and 5
  voc     the same and Table 3 on PASCAL VOC 2012, next to the published figures; days on a GPU
  photos  the method on photographs without a GPU, in VOC's layout: labels and segmenters by class,
          one setting on many features, Figs. 8 and 9, Table 6, audit; see docs/results.md
  coco    Table 3 and Figs. 8 and 9 on MS COCO 2014; days on a GPU

  --seeds N ...   one or more; several give mean and spread (default: 0)
  --only NAME ... table3 to table6, figure8, figure9, figure10, features; default: all
  --jobs N        commands at a time (default: demo, photos: one per core, else 1)
  --quick         demo: smaller and faster, shows that everything runs, without Tables 4 and 5
  other options   voc, coco, photos: settings of all stages, such as --data.root FOLDER; with --uss.cache true
                  Fig. 10 reads features from disk (4 GB for VOC) instead of computing them again

voc and coco first look for all images, tags, masks and weight files.
An interrupted run continues where it was.
HELP
    exit 0
  fi
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/tools/setup.sh"
cd "$root"
# Compiled code and the list of fonts are kept in .venv, for the next run and for the tests.
export PYTHONDONTWRITEBYTECODE='' PYTHONPYCACHEPREFIX=$root/.venv/pycache
export NUMBA_CACHE_DIR=$root/.venv/numba-cache MPLCONFIGDIR=$root/.venv/matplotlib
exec .venv/bin/python tools/paper/reproduce.py "$@"
