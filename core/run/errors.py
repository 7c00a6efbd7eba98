"""Errors that a user can cause and fix, in one message each; and errors that were not foreseen."""

import os
import re
import shlex
import sys
import sysconfig
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

AGAIN = "the same command resumes from here."


class UserError(Exception):
    """Something in the input is wrong: says what, where, what was expected, and the remedy."""

    def __str__(self) -> str:
        """The message, without the traceback that a loading process of torch puts before it."""
        return super().__str__().rsplit(f"{__name__}.{type(self).__name__}: ", 1)[-1].strip()


def refuse(title: str, lines: Sequence[str], remedy: str) -> None:
    """If there are `lines`, raises one `UserError` with the first ones and a count of the rest."""
    if lines:
        rest = [f"... and {len(lines) - 8} more"] if len(lines) > 8 else []
        shown = "\n".join(f"  {line}" for line in [*lines[:8], *rest])
        raise UserError(f"{title}:\n{shown}\nRemedy: {remedy}")


def raise_all(problems: Sequence[str], remedy: str) -> None:
    """Raises one `UserError` with the first of `problems`, a count of the rest, and `remedy`."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    refuse(f"{count} with the input", [f"- {p}" for p in problems], remedy)


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`; what a user can cause ends in one message, not a traceback.

    Under torchrun, it joins the processes first; all but the first print only errors (their
    progress bars are switched off in core/__init__.py). An unforeseen error also becomes one
    message, with its traceback in a file; with MARS_TRACEBACK=1 in the environment, the traceback
    is printed instead.
    """
    watch_files()
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack letters of a name
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and int(os.environ.get("RANK", "0")):
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (until the end)
    try:
        if several:
            from core.run import distributed  # imports torch, which some tools do without

            distributed.start()
        main()
        if several:
            distributed.dist.destroy_process_group()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; {AGAIN}")
    except Exception as error:  # noqa: BLE001 (the last resort: reported, its traceback is kept)
        advice = _advice(error) or _report(error)
        sys.exit(f"error: {advice}\nNothing finished was lost; {AGAIN}")


_reading = threading.local()
_reports: list[Path] = []  # the run folder, once it is known
_LAST = "last file read: "
_CODE = (".py", ".pyc", ".so", ".nbi", ".nbc")
_SYSTEM = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_SYSTEM += ("/proc/", "/sys/", "/dev/", "/etc/")


def report_in(folder: Path) -> None:
    """Says where the traceback of an unforeseen error goes: the run folder."""
    _reports[:] = [folder]


@cache
def watch_files() -> None:
    """From now on, each thread of this process remembers the last data file that it opened."""
    sys.addaudithook(_remember)


def _remember(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not isinstance(arguments[0], str):
        return
    path, mode = arguments[:2]
    if str(mode).startswith("r") and not path.endswith(_CODE) and not path.startswith(_SYSTEM):
        _reading.last = path


@dataclass(frozen=True)
class NamesFile:
    """A function for another thread or process; its unforeseen errors name the file last read."""

    work: Callable[[Any], Any]

    def __call__(self, item: Any) -> Any:
        watch_files()
        _reading.last = None
        try:
            return self.work(item)
        except UserError:
            raise
        except Exception as error:
            if _reading.last and hasattr(error, "add_note"):  # from Python 3.11 on
                error.add_note(f"{_LAST}{_reading.last}")
            raise

    __getitem__ = __call__  # for a loader's data set


def _report(error: Exception) -> NoReturn:
    """Ends the script with one message about an unforeseen error."""
    if os.environ.get("MARS_TRACEBACK", "0") not in ("", "0"):
        raise error
    text = "".join(traceback.format_exception(error))
    files = re.findall(rf"^{_LAST}(.+)$", text, re.MULTILINE) or [getattr(_reading, "last", None)]
    lines = [line for line in str(error).strip().splitlines() if not line.startswith(_LAST)]
    what = f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
    working = f"\n{_LAST}{files[-1]}" if files[-1] else ""
    command = f"command: {shlex.join(sys.argv)}\nPython {sys.version}"
    path = _saved(f"{command}\n{working.strip()}\n{text}")
    sys.exit(
        f"error: unforeseen {what}{working}\nThis is a bug, or an unsupported input. Please "
        f"report it, with {path}: the traceback is there (MARS_TRACEBACK=1 prints it)"
    )


def _saved(text: str) -> Path:
    rank = os.environ.get("RANK", "0")
    name = f"traceback-{Path(sys.argv[0]).stem}{f'-{rank}' if rank != '0' else ''}.txt"
    for folder in (*_reports, Path(tempfile.gettempdir())):
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, "utf-8", errors="backslashreplace")
            return folder / name
    return Path("the output above")


def _advice(error: Exception) -> str | None:
    """What to do about an error of the machine; None if it is of another kind."""
    if not isinstance(error, (OSError, MemoryError, RuntimeError)):
        return None
    text = str(error)

    def says(*parts: str) -> bool:
        return any(part in text for part in parts)

    # Messages of torch and CUDA, of torch on a CPU, and of CUDA's libraries.
    full = says("out of memory", "DefaultCPUAllocator", "_ALLOC_FAILED")
    if full or isinstance(error, MemoryError):
        return (
            "out of memory. Lower the batch size of this stage, split its batches (accumulate), "
            "lower the crop or the scales, predict in windows (evaluation.window), or shrink the "
            "images"
        )
    if says("Too many open files"):
        return "too many open files; raise the limit (`ulimit -n 4096`) or set workers: 0"
    lost = says("DataLoader worker (pid", "shared memory", "shm_open")
    if isinstance(error, BrokenPipeError):
        return "the program that reads this output has ended"
    if lost or isinstance(error, ConnectionError):
        return (
            "a process that loads images ended suddenly; memory or shared memory (/dev/shm) may "
            "have run out. Set workers: 0, or give docker --shm-size 8g"
        )
    if says("closed by peer", "reset by peer", "remote process exited"):
        return "another process of this run ended; its own message says why"
    if not isinstance(error, OSError):
        return None
    if error.errno is None:  # of a loading process
        return text.strip().splitlines()[-1]
    place = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror}{place}; fix this, then rerun"
