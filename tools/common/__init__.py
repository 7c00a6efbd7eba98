"""What several tools share: the clone's folder, parsers, jobs, pages, charts, cuts and titles."""

import argparse
from pathlib import Path

from core.run.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
"""The clone, in which jobs run and relative folders start."""


def tool_parser(doc: str, **options) -> argparse.ArgumentParser:
    """A parser whose --help shows a tool's docstring unchanged."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=formatter, **options)


def check_outside(output: Path, *folders: Path) -> None:
    """Refuses results inside a folder that is read: the next call would read them, too.

    Raises:
        UserError: `output` is one of the folders, or below one.
    """
    for folder in folders:
        if folder.is_dir() and folder.resolve() in (output.resolve(), *output.resolve().parents):
            raise UserError(
                f"--output {output} is inside {folder}; its files would be read as input. Choose "
                "another --output"
            )
