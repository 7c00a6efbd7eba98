#!/usr/bin/env bash
# Makes .venv in the clone and installs requirements.txt into it.
# The second call returns at once unless a requirements file or the Python has changed.
#
#   bash tools/setup.sh              what the pipeline needs
#   bash tools/setup.sh --dev        and what the tests need
#   bash tools/setup.sh --optional   and pydensecrf and ONNX, where they can be installed
#   PYTHON=python3.12 bash tools/setup.sh     with this interpreter
set -euo pipefail

say() { printf 'set-up: %s\n' "$*"; }

fail() { # fail WHAT [REMEDY...]: one message, one remedy a line
  printf 'Set-up stopped: %s\n' "$1" >&2
  shift
  if (($#)); then printf '  %s\n' "$@" >&2; fi
  exit 1
}

wanted=requirements.txt optional=0
for arg in "$@"; do
  case $arg in
    --dev) wanted=requirements-dev.txt ;;
    --optional) optional=1 ;;
    *) fail "unknown option $arg; there are --dev and --optional." ;;
  esac
done

if [[ ${PYTHON:-} == */* && $PYTHON != /* ]]; then PYTHON=$PWD/$PYTHON; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
log=.venv/install.log
again='run the same command again'
afresh="To start afresh: rm -r '$PWD/.venv', then $again."

ticker_pid=''
trap 'if [[ $ticker_pid ]]; then kill "$ticker_pid" 2>/dev/null || true; fi' EXIT
exec 3>&2 # a trap inherits the redirections of the command that it interrupts
trap 'printf "\nSet-up interrupted; to continue, %s.\n" "$again" >&3; exit 130' INT TERM

# Python -----------------------------------------------------------------------------------------

supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; }
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo unknown; }

find_python() { # sets base
  if [[ ${PYTHON:-} ]]; then
    command -v "$PYTHON" >/dev/null ||
      fail "there is no PYTHON=$PYTHON." 'Name a Python 3.10 to 3.14 by its path, or unset PYTHON.'
    supported "$PYTHON" ||
      fail "PYTHON=$PYTHON has version $(version "$PYTHON"); Python 3.10 to 3.14 is needed."
    base=$PYTHON
    return
  fi
  for base in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
    if supported "$base"; then return; fi
  done
  base=none
  if command -v python3 >/dev/null; then base=$(version python3); fi
  fail "Python 3.10 to 3.14 is needed; the version of python3 here: $base." \
    'Debian, Ubuntu: sudo apt install python3 python3-venv' \
    'macOS:          brew install python@3.13' \
    'Installed elsewhere: put PYTHON=/path/to/python3.13 before the same command'
}

check_base() {
  find_python
  "$base" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "Python's venv module is missing ($base)." \
      "Debian, Ubuntu: sudo apt install python$(version "$base")-venv, then $again."
}

check_venv() {
  "$python" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null ||
    fail '.venv does not work: it is incomplete, or the Python it was made with is gone.' "$afresh"
  supported "$python" ||
    fail ".venv has Python $(version "$python"); 3.10 to 3.14 is needed." "$afresh"
  if [[ ${PYTHON:-} ]]; then
    find_python
    [[ $(version "$base") == "$(version "$python")" ]] ||
      fail ".venv has Python $(version "$python"), but PYTHON=$PYTHON is $(version "$base")." "$afresh"
  fi
}

# Phases -----------------------------------------------------------------------------------------

free() { df -Ph "$1" | awk 'END {print $4}'; }
logged() { grep -qiE "$1" "$log" 2>/dev/null; }

explain() { # explain WHAT [REMEDY]: adds the likely cause, read from the log
  local cause remedy=${2:-"What was fetched is kept: $again."} tmp=${TMPDIR:-/tmp}
  if logged 'no space left on device' || (($(df -Pk . | awk 'END {print $4}') < 20000)); then
    fail "$1: the disk is full." "Free here: $(free .); 2 GB are needed, 6 GB for the CUDA build." \
      "Free in $tmp, where pip unpacks: $(free "$tmp"); TMPDIR=/another/folder moves that." \
      "Then $again. Full log: $PWD/$log"
  elif logged 'NewConnection|NameResolution|ConnectTimeout|ReadTimeout|ProxyError|SSLError|connection broken'; then
    fail "$1: the package index was not reached." \
      'Check the network, and HTTPS_PROXY if yours needs a proxy.' "$remedy" "Full log: $PWD/$log"
  fi
  cause=$(grep -E '^(ERROR|[A-Za-z.]*Error):' "$log" | head -n 1 | cut -c 1-300 || true)
  fail "$1." ${cause:+"$cause"} "$remedy" "Full log: $PWD/$log"
}

ticker() { # on a terminal: the seconds so far and what is going on
  while sleep 1 && kill -0 $$ 2>/dev/null; do
    now=$(awk '/^== / {now = ""} /^ *(Collecting|Downloading|Installing) / {now = $1 " " $2} END {print now}' "$log")
    printf '\r\033[K%.79s' "$1$((SECONDS - $2)) s  $now"
  done
}

phase() { # phase WHAT COMMAND...: one line on the screen, the output in the log
  local line="set-up: $1 ... " start=$SECONDS rc=0
  shift
  printf '%s' "$line"
  printf '== %s\n' "$line" >>"$log"
  if [[ -t 1 ]]; then
    ticker "$line" "$start" &
    ticker_pid=$!
  fi
  "$@" >>"$log" 2>&1 </dev/null || rc=$?
  if [[ $ticker_pid ]]; then
    kill "$ticker_pid" 2>/dev/null || true
    wait "$ticker_pid" 2>/dev/null || true
    ticker_pid=''
    printf '\r\033[K%s' "$line"
  fi
  printf '%d s\n' $((SECONDS - start))
  return $rc
}

# Compiling every module would take twice as long as the rest; the first import compiles what it needs.
install() {
  PIP_USER=0 PIP_REQUIRE_VIRTUALENV=1 "$python" -m pip install --no-input --prefer-binary \
    --disable-pip-version-check --progress-bar off --no-compile -r "$1"
}

try_imports() { # shows a broken package here, and compiles once for the demo and the tests
  PYTHONDONTWRITEBYTECODE='' PYTHONPYCACHEPREFIX=$PWD/.venv/pycache "$python" -c \
    'import cv2, jinja2, jsonargparse, numba, PIL.Image, safetensors.torch, torch, yaml'
}

digest() { # of the Python and of a requirements file with the files that it names
  "$python" -ISc 'import hashlib, pathlib, sys
text = pathlib.Path(sys.argv[1]).read_bytes()
if b"-r requirements.txt" in text:
    text += pathlib.Path("requirements.txt").read_bytes()
print(hashlib.sha256(sys.version.encode() + text).hexdigest())' "$1"
}
installed() { [[ -x $python && -f .venv/$1.sha256 && $(<".venv/$1.sha256") == "$(digest "$1")" ]]; }
record() { digest "$1" >".venv/$1.sha256"; }

# The work ---------------------------------------------------------------------------------------

if [[ -x $python || -L $python ]]; then check_venv; else check_base; fi

if ! installed "$wanted"; then
  mkdir -p .venv 2>/dev/null || true
  if ! { : >.venv/lock; } 2>/dev/null; then
    fail "cannot write in $PWD/.venv." 'Is the folder yours, and is there room on the disk?'
  fi
  if command -v flock >/dev/null; then # the demo and the tests started together take turns
    exec 9>.venv/lock
    flock -n 9 || { say 'another set-up is at work here; waiting for it' && flock 9; } || true
  fi
fi

if ! installed "$wanted"; then
  : >"$log"
  [[ -x $python ]] || "$base" -m venv --without-pip .venv >>"$log" 2>&1 ||
    explain 'no virtual environment could be made'
  check_venv
  say "Python $(version "$python") in $PWD/.venv"
  if [[ ! -e .venv/pip-ready ]]; then
    phase 'pip' "$python" -m ensurepip --default-pip || explain 'pip could not be set up'
    : >.venv/pip-ready
  fi
  [[ -e .venv/requirements.txt.sha256 ]] || say 'PyTorch is large: on a slow line the next step takes minutes'
  phase "installing $wanted" install "$wanted" ||
    explain "pip could not install $wanted"
  phase 'trying the imports' try_imports || explain 'an installed package does not work' "$afresh"
  # Last, so that a set-up that was killed is repeated.
  record requirements.txt
  record "$wanted"
fi

if ((optional)) && ! installed requirements-optional.txt; then
  log=.venv/install-optional.log
  skipped() { say "the comparison with pydensecrf is skipped: $1. Nothing else needs it."; }
  if ! "$python" -c 'import sys; sys.exit(sys.version_info >= (3, 13))'; then
    skipped 'it does not build on Python 3.13 or later'
  elif ! { command -v c++ || command -v g++ || command -v clang++; } >/dev/null; then
    skipped 'no C++ compiler (Debian, Ubuntu: sudo apt install g++)'
  elif ! "$python" -c 'import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())'; then
    skipped 'no Python headers (Debian, Ubuntu: sudo apt install python3-dev)'
  elif : >"$log" && phase 'building pydensecrf2, to compare our CRF with' install requirements-optional.txt; then
    record requirements-optional.txt
  else
    skipped "it did not build (log: $log)"
  fi
fi
if ((optional)) && ! installed requirements-onnx.txt; then
  log=.venv/install-onnx.log
  if : >"$log" && phase 'installing ONNX, for network files' install requirements-onnx.txt; then
    record requirements-onnx.txt
  else
    say "tests of ONNX files are skipped: it cannot be installed (log: $log). No stage needs it."
  fi
fi
