"""What a script says about an error that nobody foresaw."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, ROOT, run_python

from core.run.errors import UserError, raise_all, run_script

START = f"""
import sys, tempfile
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from core.run.errors import NamesFile, UserError, report_in, run_script
a, b, run = Path("a.txt"), Path("b.txt"), Path("run")
def read(path):
    return path.read_text()
"""


def script(folder: Path, body: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script of this body, which may read two files."""
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(name)
    (folder / "odd_script.py").write_text(START + body)
    values = {**os.environ, "TMPDIR": str(folder), "MARS_TRACEBACK": "0", **environment}
    command = [sys.executable, "odd_script.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=values)


MAIN = """
def main():
    report_in(run)
    read(a)
    read(b)
    {}
run_script(main)
"""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("None + 1", "unforeseen TypeError: unsupported operand"),
        ("{}['x']", "unforeseen KeyError: 'x'"),
        ("raise RuntimeError('of a library')", "unforeseen RuntimeError: of a library"),
        ("assert False", "unforeseen AssertionError"),
    ],
)
def test_unforeseen_error_is_one_message_that_names_the_file_in_work(tmp_path, line, said):
    done = script(tmp_path, MAIN.format(line))
    assert done.returncode == 1 and done.stderr.startswith(f"error: {said}")
    assert "last file read: b.txt\n" in done.stderr and "Please report it" in done.stderr
    assert "Traceback" not in done.stderr and "run/traceback-odd_script.txt" in done.stderr
    kept = (tmp_path / "run/traceback-odd_script.txt").read_text()
    assert "Traceback (most recent call last)" in kept and line.split("(")[0] in kept
    assert "command: odd_script.py" in kept and "last file read: b.txt" in kept


def test_traceback_is_kept_where_no_run_folder_is_known_or_can_be_written(tmp_path):
    for body in (MAIN.format("None + 1").replace("report_in(run)", ""), None):
        if body is None:
            (tmp_path / "run").write_text("a file is in the way")
            body = MAIN.format("None + 1")
        done = script(tmp_path, body)
        path = tmp_path / "traceback-odd_script.txt"
        assert done.returncode == 1 and str(path) in done.stderr
        assert "TypeError" in path.read_text()
        path.unlink()


def test_developers_see_the_traceback(tmp_path):
    done = script(tmp_path, MAIN.format("None + 1"), MARS_TRACEBACK="1")
    assert done.returncode == 1 and "Traceback (most recent call last)" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "said", "status"),
    [
        ("raise UserError('mend it')", "error: mend it\n", 1),
        ("raise KeyboardInterrupt", "\nstopped; the same command resumes from here.\n", 1),
        ("sys.exit(3)", "", 3),
        ("raise MemoryError", "error: out of memory.", 1),
        ("__import__('torch').empty(2**60)", "error: out of memory.", 1),
        ("read(Path('gone'))", "error: No such file or directory (gone)", 1),
        ("raise RuntimeError('[x.cc:3] Connection closed by peer')", "error: another process", 1),
    ],
)
def test_foreseen_errors_are_told_as_before(tmp_path, line, said, status):
    done = script(tmp_path, MAIN.format(line))
    assert done.returncode == status and done.stderr.startswith(said)
    assert "report" not in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs notes of exceptions")
@pytest.mark.parametrize("pool", ["ThreadPoolExecutor", "ProcessPoolExecutor"])
def test_error_of_a_thread_or_process_names_the_file_read_there(tmp_path, pool):
    body = f"""
from concurrent.futures import {pool}
def work(path):
    return int(path.read_text()) if path == a else path.read_text()
def main():
    with {pool}(2) as pool:
        found = pool.map(NamesFile(work), [b, b, a, b, b])
        read(b)
        list(found)
run_script(main)
"""
    done = script(tmp_path, body)
    assert done.returncode == 1 and "unforeseen ValueError: invalid literal" in done.stderr
    assert "last file read: a.txt\n" in done.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs notes of exceptions")
@pytest.mark.parametrize("workers", [0, 2])
def test_error_of_a_loading_process_names_the_photograph(tiny_data, tmp_path, workers):
    """The fault is planted: what is done with an image after it was read."""
    body = f"""
from core.run import vision
from core.data.settings import AugmentConfig, DataConfig
from core.run.settings import Runtime
from core.data.loader import LabelledImages, batches_from
from core.data.lists import read_split
def main():
    split = read_split(DataConfig(root={str(tiny_data)!r}, classes={tuple(CLASSES)}), "train")
    data = LabelledImages(split, None, 20, AugmentConfig(crop=32))
    class View:
        def __call__(self, pixels, label, seed):
            if seed == 5:
                raise IndexError("planted")
            return pixels[:, :32, :32], label[:32, :32]
    data._view = View()
    batches = batches_from(data, 4, 4, Runtime(workers={workers}))(0)
    print(split.images[batches.batch_sampler.batch(1)[1][0]], flush=True)
    list(batches)
run_script(main)
"""
    done = script(tmp_path, body)
    assert done.returncode == 1, done.stderr
    assert "error: unforeseen IndexError: " in done.stderr and "planted\n" in done.stderr
    assert f"last file read: {done.stdout.splitlines()[-1]}\n" in done.stderr
    assert "Traceback" not in done.stderr


def test_stage_keeps_the_traceback_in_its_run_folder(experiment, tmp_path):
    """A library that changes under the program's feet is something that nobody foresees."""
    (tmp_path / "sitecustomize.py").write_text(
        "import numpy.random\n"
        "def fail(*arguments):\n    raise AttributeError('planted')\n"
        "numpy.random.default_rng = fail\n"
    )
    values = {**os.environ, "PYTHONPATH": str(tmp_path), "MARS_TRACEBACK": "0"}
    done = run_python("train_uss.py", "--config", experiment, env=values)
    assert done.returncode == 1, done.stdout
    assert "error: unforeseen AttributeError: planted" in done.stderr
    assert "Traceback" not in done.stderr
    kept = tmp_path / "run/traceback-train_uss.txt"
    assert str(kept) in done.stderr and "planted" in kept.read_text()


def test_problems_are_counted_and_the_first_are_shown():
    raise_all([], "nothing")
    with pytest.raises(UserError, match=r"(?s)12 problems.*p7.*and 4 more.*mend"):
        raise_all([f"p{k}" for k in range(12)], "mend")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("the lamp is off"), "the lamp is off"),
        (OSError(28, "No space left on device", "/x/y"), "No space left"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (RuntimeError("Too many open files. Communication with the workers is"), "ulimit -n"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "/dev/shm"),
        (RuntimeError("unable to open shared memory object </torch_1>"), "--shm-size"),
        (ConnectionResetError(104, "Connection reset by peer"), "/dev/shm"),
        (BrokenPipeError(32, "Broken pipe"), "the program that reads this output has ended"),
        (MemoryError(), "accumulate"),
        (torch.OutOfMemoryError("CUDA out of memory."), "evaluation.window"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "accumulate"),
        (OSError("Caught OSError in a process.\nTraceback:\nOSError: I/O"), "error: OSError: I/O"),
        (UserError("Caught in a process.\ncore.run.errors.UserError: dark"), "^error: dark$"),
        (KeyboardInterrupt(), "resumes from here"),
    ],
)
def test_scripts_end_in_one_message(error, message):
    def main():
        raise error

    with pytest.raises(SystemExit, match=message):
        run_script(main)
