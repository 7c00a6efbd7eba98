"""The analyses in <run_dir>/analysis/, which other tools write: a table, and perhaps a figure.

    {"title": str, "caption": str, "columns": [str], "rows": [[str | number]],
     "figure": "name.png" or null, "command": str, "order": int}

The figure is in the same folder as the JSON file. The page sorts them by `order`, then by name.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.run.errors import UserError
from core.run.files import read_json
from tools.common.pages import data_url

KINDS = {"title": str, "caption": str, "columns": list, "rows": list, "command": str, "order": int}
PNG = b"\x89PNG\r\n\x1a\n"
MOST_BYTES = 1_000_000  # per figure: the page contains all of them


@dataclass
class Analysis:
    title: str
    caption: str
    columns: list[str]
    rows: list[list[str | int | float]]
    figure: str | None  # data URL
    command: str
    order: int

    @property
    def words(self) -> list[bool]:
        """Whether each column holds words and no figures."""
        cells = zip(*self.rows, strict=True) if self.rows else [() for _ in self.columns]
        return [not any(map(_is_figure, column)) for column in cells]


def _is_figure(value: str | int | float) -> bool:
    return not isinstance(value, str) or value.lstrip("+-−")[:1].isdigit()


def read_analyses(folder: Path) -> list[Analysis]:
    """All analyses of a folder, in the order of the page; none without a folder.

    Raises:
        UserError: a file does not have the format above, or its figure is missing, broken or large.
    """
    return sorted(map(_read, sorted(folder.glob("*.json"))), key=lambda a: a.order)


def _read(path: Path) -> Analysis:
    content = read_json(path)
    problem = _problem(content)
    if problem:
        raise UserError(f"{path} is no analysis: {problem}; make it again, or move it away")
    name = content["figure"]
    figure = None if name is None else _figure(path.parent / name, path)
    return Analysis(**{key: content[key] for key in KINDS}, figure=figure)


def _problem(content: Any) -> str | None:
    """What is wrong with the content of a file; None if nothing."""
    if not isinstance(content, dict):
        return "it is not an object"
    missing = [key for key in (*KINDS, "figure") if key not in content]
    if missing:
        return f"{', '.join(missing)} missing"
    for key, kind in KINDS.items():
        if not isinstance(content[key], kind) or isinstance(content[key], bool):
            return f"{key} is {content[key]!r:.60}, expected {kind.__name__}"
    columns, rows, figure = content["columns"], content["rows"], content["figure"]
    if not all(isinstance(name, str) for name in columns):
        return "columns holds something other than strings"
    for k, row in enumerate(rows, 1):
        if not isinstance(row, list) or len(row) != len(columns):
            return f"row {k} is not a list of {len(columns)} values, one for each column"
        if any(not isinstance(v, str | int | float) or isinstance(v, bool) for v in row):
            return f"row {k} holds something other than strings and numbers"
    # A name from elsewhere must not reach files outside the folder.
    if figure is not None and (not isinstance(figure, str) or Path(figure).name != figure):
        return f"figure is {figure!r:.60}, expected null or the name of a file in this folder"
    return None


def _figure(path: Path, analysis: Path) -> str:
    """The PNG that `analysis` names, as a data URL."""
    remedy = f'save it again, or set "figure" to null in {analysis}'
    if not path.is_file():
        raise UserError(f"{path} is missing; {remedy}")
    content = path.read_bytes()
    if not content.startswith(PNG):
        raise UserError(f"{path} is no PNG; {remedy}")
    if len(content) > MOST_BYTES:
        size = f"{len(content) / 1e6:.1f} MB"
        raise UserError(f"{path} has {size}, a figure at most {MOST_BYTES / 1e6:g} MB; {remedy}")
    return data_url(content, "png")


def cell(value: str | int | float) -> str:
    """A table cell: strings and integers as they are, other numbers with four digits."""
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "–"
    return f"{value:.0f}" if abs(value) >= 1000 else str(float(f"{value:.4g}"))
