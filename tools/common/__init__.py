"""What several tools share: the clone's folder, parsers, jobs, pages, charts, cuts and titles."""

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The clone, in which jobs run and relative folders start."""


def tool_parser(doc: str, **options) -> argparse.ArgumentParser:
    """A parser whose --help shows a tool's docstring unchanged."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=formatter, **options)
