"""Errors that a user can cause and mend, told in one message."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


class UserError(Exception):
    """Something in the input is wrong: says what, where, what was expected, and the remedy."""


def refuse_together(problems: Sequence[str], remedy: str) -> None:
    """Raises one `UserError` with the first of `problems`, a count of the rest, and `remedy`."""
    if problems:
        shown = "\n".join(f"  - {p}" for p in problems[:8])
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{count} with the input:\n{shown}{more}\nRemedy: {remedy}")


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`; what a user can cause ends in one message, not a traceback.

    Below torchrun, joins the processes before; those but the first print errors alone.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        from core import distributed  # imports torch, which some tools do without

        if distributed.rank():
            os.environ["TQDM_DISABLE"] = "1"
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (until the end)
        distributed.start()
    try:
        main()
        if several:
            distributed.stop()
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # disk full, no permission, too many open files
        place = f" ({error.filename})" if error.filename else ""
        sys.exit(
            f"error: {error.strerror or error}{place}\n"
            "Nothing finished was lost; run the same command again once this is mended."
        )
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        sys.exit(
            "error: out of memory. Lower the batch size of this stage, the crop or the scales, see "
            "images through windows (evaluation.window: 512), or make smaller copies of them. "
            "Nothing finished was lost."
        )
    except KeyboardInterrupt:
        sys.exit("\nstopped; run the same command again to go on from here")
