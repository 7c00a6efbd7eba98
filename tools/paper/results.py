"""The output of every analysis: JSON for the report, PNG and PDF, Markdown on the screen."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from core.run.files import atomic_write, read_json, write_json

PAPER = Path(__file__).with_name("paper.json")
NONE = "–"  # for a missing figure
BLUE, ORANGE = "#0072b2", "#d55e00"  # also for the colour-blind
GREY, LIGHT = "#8c8c8c", "#e8e8e8"
STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text, as journals ask for
    "figure.constrained_layout.use": True,
}


@dataclass
class Analysis:
    """A table and its meaning; numbers are per cent unless their column says otherwise."""

    name: str  # stem of its files
    order: int  # place among all analyses, tables before figures
    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | float]]


def publish(
    folders: Iterable[Path], analysis: Analysis, command: str, figure: Figure | None = None
) -> None:
    """Writes <name>.json and, with a figure, <name>.png and <name>.pdf; prints a Markdown table.

    Args:
        folders: output folders, usually <run_dir>/analysis of one or more runs.
        analysis: table to write.
        command: command that makes the analysis again.
        figure: picture, drawn in the style of `styled`.
    """
    content = {
        "title": analysis.title,
        "caption": analysis.caption,
        "columns": [*analysis.columns],
        "rows": [[_plain(cell) for cell in row] for row in analysis.rows],
        "figure": f"{analysis.name}.png" if figure is not None else None,
        "command": command,
        "order": analysis.order,
    }
    # Without dates and versions, the same figure gives the same bytes.
    pictures = {".png": {"Software": None}, ".pdf": {"CreationDate": None}} if figure else {}
    for folder in folders:
        for suffix, undated in pictures.items():
            with atomic_write(folder / f"{analysis.name}{suffix}") as tmp:
                figure.savefig(tmp, format=suffix[1:], dpi=200, metadata=undated)
        write_json(folder / f"{analysis.name}.json", content)
    table = markdown(analysis.columns, analysis.rows)
    print(f"\n{analysis.title}\n\n{table}\n\n{analysis.caption}")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str | int | float]]) -> str:
    """The table as Markdown, floats with one decimal."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(text, line)) + " |" for line in lines)


def text(cell: str | int | float) -> str:
    return f"{cell:.1f}" if isinstance(cell, float) else str(cell)


def percent(value: float | None) -> float | str:
    """A share in 0..1 as per cent with one decimal; a dash for None."""
    return NONE if value is None else round(100 * float(value), 1)


def spread(values: np.ndarray) -> float | str:
    """The mean of several runs (lowest .. highest), or the figure of a single run."""
    if len(values) == 1:
        return round(float(values[0]), 1)
    return f"{values.mean():.1f} ({values.min():.1f} .. {values.max():.1f})"


def paper() -> dict[str, Any]:
    """The published figures."""
    return read_json(PAPER)


def styled(draw):
    """Decorates a function so that it draws in the style of all figures."""
    return matplotlib.rc_context(STYLE)(draw)


def _plain(cell: Any) -> str | int | float:
    return cell.item() if isinstance(cell, np.generic) else cell
