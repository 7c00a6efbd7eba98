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
LATER = (
    "numba",
    "torch._dynamo",
    "torchvision",
    "timm",
    "core.crf.permutohedral",
    "core.crf.spatial",
)
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


class Running:
    """Processes that `start` started; they are the server's children.

    Attributes:
        pids: their numbers.
        returncode: the first exit status other than 0, else 0; None while they run.
    """

    def __init__(self, pids: list[int]):
        self.pids, self.returncode = pids, None

    def poll(self, wait: bool = False) -> int | None:
        """Returns `returncode`, after all have ended if `wait`."""
        if self.returncode is None:
            self.returncode = _asked({"pids": self.pids, "wait": wait})
        return self.returncode

    def kill(self) -> int:
        """Ends all at once, as SIGKILL does; returns `returncode`."""
        for pid in self.pids if self.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        return self.poll(wait=True)


def _asked(request: dict):
    server = _server()
    print(json.dumps(request), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


def start(script: str, *arguments: str, processes: int = 1, files: tuple = ()) -> Running:
    """Starts a script of the repository in its root.

    Args:
        script: path of the script.
        arguments: its arguments.
        processes: number of processes that share the work as below torchrun.
        files: paths to which standard output and standard error go; none: both are thrown away.
    """
    environments = [dict(os.environ)]
    if processes > 1:
        with socket.create_server(("127.0.0.1", 0)) as server:
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        shared |= {"WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
        ranks = [{"RANK": str(k), "LOCAL_RANK": str(k)} for k in range(processes)]
        environments = [{**os.environ, **shared, **rank} for rank in ranks]
    files = [str(path) for path in files] or [os.devnull] * 2
    command = [str(word) for word in (script, *arguments)]
    return Running(_asked({"command": command, "files": files, "environments": environments}))


def run(script: str, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess:
    """`start`, to its end; returns what the script wrote as text."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        status = start(script, *arguments, processes=processes, files=files).poll(wait=True)
        texts = [path.read_text(errors="replace") for path in files]
    return subprocess.CompletedProcess([script, *arguments], status, *texts)


def _serve() -> tuple[list[str], list[str], dict[str, str]] | None:
    """Answers each line of standard input; returns what to run in a child."""
    for line in sys.stdin:
        request, pids = json.loads(line), []
        if "pids" in request:
            print(json.dumps(_status({*request["pids"]}, request["wait"])), flush=True)
            continue
        for environment in request["environments"]:
            child = os.fork()
            if not child:
                return request["command"], request["files"], environment
            pids.append(child)
        print(json.dumps(pids), flush=True)
    return None


def _status(children: set[int], wait: bool) -> int | None:
    """The first exit status other than 0 of those that ended; None: one still runs."""
    status = 0
    while children:
        one = -1 if len(children) > 1 else [*children][0]
        child, code = os.waitpid(one, 0 if wait else os.WNOHANG)
        if not child:
            return None
        children.discard(child)
        status = status or os.waitstatus_to_exitcode(code)
        for other in children if code else ():
            os.kill(other, signal.SIGKILL)  # it would wait for the one that failed
    return status


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
