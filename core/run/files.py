"""Files that appear whole or not at all."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from core.run.errors import UserError
from core.run.text import read_text


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` and renames it once the block has ended well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.part")  # torch.save writes this name into its file
    try:
        yield tmp
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


def read_arrays(path: Path, names: Sequence[str], remedy: str) -> dict[str, np.ndarray]:
    """Arrays of an .npz file, by name.

    Raises:
        UserError: the file is missing or broken, or an array is missing or holds objects.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in names}
        if any(array.dtype.kind not in "biuf" for array in arrays.values()):
            raise ValueError("an array holds no numbers")
    except Exception as error:  # noqa: BLE001 (a broken archive fails in any way)
        raise UserError(
            f"{path} cannot be read ({error or type(error).__name__}); {remedy}"
        ) from None
    return arrays


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    with atomic_write(path) as tmp:
        tmp.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", "utf-8")


def read_json(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path} is missing; run the stage that writes it first")
    try:
        return json.loads(read_text(path, "the file"))
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); remove it to have it made again"
        ) from None
