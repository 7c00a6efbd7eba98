"""Tables of image-level tags."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from core.run.files import atomic_write


def write_table(path: Path, table: Mapping[str, Sequence[str]]) -> None:
    """Writes a table that `core.data.tags.read_table` reads, completely or not at all."""
    with atomic_write(path) as tmp, tmp.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "tags"])
        writer.writerows((name, ";".join(tags)) for name, tags in table.items())
