"""Runs the repository's scripts in forks of one process that has imported what they need.

A script is run as `python SCRIPT ARGUMENTS` would: in a process of its own, with its own files,
exit status and end of the interpreter. Only the imports, which take seconds, are done once.
"""

import functools
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train_uss", "train_wsss", "make_debiased_labels", "train_segmentation", "evaluate")
LATER = ("numba", "torch._dynamo", "torchvision", "timm", "core.crf.permutohedral")
"""What the scripts import when they come to need it."""


@functools.cache
def _server() -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, __file__], **pipes)


def stop() -> None:
    """Ends the process, if it was started."""
    if _server.cache_info().currsize:
        _server().communicate()
        _server.cache_clear()


def run(script: str, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess:
    """Runs a script of the repository, in its root, and returns what it wrote as text.

    Args:
        script: path of the script.
        arguments: its arguments.
        processes: number of processes that share the work as below torchrun.
    """
    command, environments = [script, *arguments], [dict(os.environ)]
    if processes > 1:
        with socket.create_server(("127.0.0.1", 0)) as server:
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        shared |= {"WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
        ranks = [{"RANK": str(k), "LOCAL_RANK": str(k)} for k in range(processes)]
        environments = [{**os.environ, **shared, **rank} for rank in ranks]
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder, name)) for name in ("out", "err")]
        request = {"command": command, "files": files, "environments": environments}
        server = _server()
        print(json.dumps(request), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        texts = [Path(path).read_text(errors="replace") for path in files]
    return subprocess.CompletedProcess(command, status, *texts)


def _serve() -> tuple[list[str], list[str], dict[str, str]] | None:
    """Forks for each line of standard input; returns what to run in the child."""
    for line in sys.stdin:
        request, children = json.loads(line), set()
        for environment in request["environments"]:
            child = os.fork()
            if not child:
                return request["command"], request["files"], environment
            children.add(child)
        status = 0
        while children:
            child, code = os.wait()
            children.remove(child)
            status = status or os.waitstatus_to_exitcode(code)
            for other in children if code else ():
                os.kill(other, signal.SIGKILL)  # it would wait for the one that failed
        print(status, flush=True)
    return None


def _main() -> None:
    sys.path[0] = str(ROOT)
    for name in (*SCRIPTS, *LATER):
        importlib.import_module(name)
    found = _serve()
    if found is None:
        return
    command, files, environment = found
    for number, path in enumerate((os.devnull, *files)):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = command
    sys.path[0] = str(Path(command[0]).resolve().parent)
    runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    _main()
