"""The demonstration killed in each of its stages; minutes long, so run by tools/test.sh --all."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

KILLED_AT = (
    "uss/stego/checkpoint.pth",
    "wsss/labels/*.png",
    "debias/clusters/*.npz",
    "segmentation/mars/checkpoint.pth",
    "evaluation/mars/predictions/*.png",
)


@pytest.fixture
def clone(tmp_path) -> Path:
    """The files under version control, elsewhere: the demo writes into its own clone."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git clone, to know which files belong to it")
    command = ["git", "-C", ROOT, "ls-files", "-z"]
    names = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        target = tmp_path / "clone" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    return tmp_path / "clone"


def demo(clone: Path, run_dir: str) -> subprocess.Popen:
    command = [sys.executable, "tools/demo/run_demo.py", "--quick", "--run-dir", run_dir]
    return subprocess.Popen(command, cwd=clone, stdout=subprocess.DEVNULL)


def scores(run_dir: Path) -> dict[str, bytes]:
    """The scores by evaluation; they name the folder that was scored, which differs."""
    files = run_dir.glob("evaluation/*/scores.json")
    return {p.parent.name: p.read_bytes().replace(bytes(run_dir), b"") for p in files}


@pytest.mark.slow
def test_demo_killed_in_each_stage_ends_with_the_same_scores(clone):
    assert demo(clone, "runs/whole").wait() == 0
    for pattern in KILLED_AT:
        process = demo(clone, "runs/killed")
        while process.poll() is None and not any((clone / "runs/killed").glob(pattern)):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"ended before {pattern}"
        time.sleep(1)  # its jobs end with it
    assert demo(clone, "runs/killed").wait() == 0
    whole = scores(clone / "runs/whole")
    assert len(whole) >= 7 and scores(clone / "runs/killed") == whole
    began = time.monotonic()
    assert demo(clone, "runs/killed").wait() == 0
    assert time.monotonic() - began < 30  # nothing is done twice
