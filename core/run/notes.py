"""Decisions made while reading input, each printed once to standard error."""

import os
import sys

told: dict[str, str] = {}
"""The lines printed so far, by their subject."""


def note(text: str, about: str = "", title: str = "note") -> None:
    """Prints one line, unless there was one about the same subject.

    Args:
        text: the line.
        about: subject of the line; empty: the text itself.
        title: first word of the line.
    """
    about = about or text
    if about not in told:
        told[about] = f"{title}: {text}"
        if os.environ.get("RANK", "0") == "0":
            print(told[about], file=sys.stderr)


def warn(text: str) -> None:
    """Prints a line about something that is probably not what the user wants."""
    note(text, title="warning")


def warnings() -> int:
    """The number of warnings printed."""
    return sum(line.startswith("warning: ") for line in told.values())
