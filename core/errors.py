"""Errors that a user can cause and mend, told in one message."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

AGAIN = "the same command goes on from here."
OUT_OF_MEMORY = (
    "out of memory. Lower the batch size of this stage, cut its batches (accumulate), lower the "
    "crop or the scales, see images through windows (evaluation.window), or make smaller copies"
)
LOADER_LOST = (
    "a process that loads images ended suddenly; memory or shared memory (/dev/shm) may be short. "
    "Set workers: 0, or give docker --shm-size 8g"
)
TOO_MANY_FILES = "too many open files; raise the limit (`ulimit -n 4096`) or set workers: 0"


class UserError(Exception):
    """Something in the input is wrong: says what, where, what was expected, and the remedy."""

    def __str__(self) -> str:
        """The message, without the traceback that a loading process of torch puts before it."""
        return super().__str__().rsplit(f"{__name__}.{type(self).__name__}: ", 1)[-1].strip()


def refuse_together(problems: Sequence[str], remedy: str) -> None:
    """Raises one `UserError` with the first of `problems`, a count of the rest, and `remedy`."""
    if problems:
        shown = "\n".join(f"  - {p}" for p in problems[:8])
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{count} with the input:\n{shown}{more}\nRemedy: {remedy}")


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`; what a user can cause ends in one message, not a traceback.

    Below torchrun, joins the processes before; those but the first print errors alone (their
    progress bars are switched off in core/__init__.py).
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack letters of a name
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        from core import distributed  # imports torch, which some tools do without

        if distributed.rank():
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (until the end)
        distributed.start()
    try:
        main()
        if several:
            distributed.stop()
    except UserError as error:
        sys.exit(f"error: {error}")
    except (OSError, MemoryError, RuntimeError) as error:
        told = _told(error)
        if told is None:
            raise
        sys.exit(f"error: {told}\nNothing finished was lost; {AGAIN}")
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; {AGAIN}")


def _told(error: Exception) -> str | None:
    """What a user can do about an error of the machine; None where it is none."""
    text, kind = str(error), type(error).__name__
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":
        return OUT_OF_MEMORY
    if "Too many open files" in text:
        return TOO_MANY_FILES
    lost = any(part in text for part in ("DataLoader worker (pid", "shared memory", "shm_open"))
    if lost or isinstance(error, ConnectionError):
        return LOADER_LOST
    if not isinstance(error, OSError):
        return None
    if error.errno is None:  # of a loading process
        return text.strip().splitlines()[-1]
    place = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror}{place}; mend this first"
