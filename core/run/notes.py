"""What was decided while reading, told once on standard error."""

import os
import sys

told: dict[str, str] = {}
"""The lines told so far, by what they are about."""


def note(text: str, about: str = "", title: str = "note") -> None:
    """Tells one line, unless something about the same matter was told before.

    Args:
        text: the line.
        about: the matter; empty: the text itself.
        title: the line's first word.
    """
    about = about or text
    if about in told:
        return
    told[about] = f"{title}: {text}"
    if os.environ.get("RANK", "0") == "0":
        print(told[about], file=sys.stderr)


def warn(text: str) -> None:
    """Tells a line about something that is probably not what the user wants."""
    note(text, title="warning")


def warnings() -> int:
    """How many warnings were told."""
    return sum(line.startswith("warning: ") for line in told.values())
