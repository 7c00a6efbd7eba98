"""Image-level tags: which classes an image shows, from a table, an annotation or a folder."""

import ast
import csv
import io
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Sequence
from pathlib import Path

from core.data.finder import PHOTOGRAPHS, Files
from core.data.names import class_name
from core.run.errors import UserError, raise_all
from core.run.files import read_text
from core.run.log import note

SEPARATORS = re.compile(r"[;,|]")
COLUMN_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
IMAGE_COLUMNS = (
    {"image"},
    {"file_name", "filename", "file", "file_path", "filepath", "path", "image_path", "image_name"}
    | {"image_file", "images", "img", "photo"},
    {"image_id", "image_index", "id", "name"},
)
"""Headings in lower case with underscores; the first set with a match decides."""
TAG_COLUMNS = (
    {"tags"},
    {"tag", "label", "labels", "class", "classes", "class_name", "category", "categories"}
    | {"category_name", "label_name", "finding_labels"},
)
NO_TAG = {"", "nan", "none", "null", "<na>", "n/a", "#n/a"}
PRESENT = {"1", "1.0", "true", "yes", "x"}
ABSENT = {"0", "0.0", "false", "no", *NO_TAG}
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)

Rows = list[tuple[int, list[str]]]
"""Line numbers and cells."""


def read_table(
    path: Path, classes: Collection[str] = (), problems: list[str] | None = None
) -> dict[str, list[str]]:
    """Reads a table of tags: the columns `image` and `tags`, or what other programs export.

    Tags of one image are separated by ";", "," or "|", or are a list as written by Python or JSON.
    In a file without any of these, a cell is one tag even with spaces, unless all of its words are
    known `classes`, and an image may have one line per tag. The columns may have other usual names
    and separators, and a column of 0 and 1 for each class may replace the tags. Other columns are
    ignored. Any form but the plain one is reported in a note. Problems of single lines are added to
    `problems`; if that is None, they raise one error.

    Returns:
        {image as written there, in NFC: its tags, without repetitions}, in the order of the file.

    Raises:
        UserError: the file is missing or is not such a table.
    """
    if not path.is_file():
        raise UserError(f"the tags {path} are missing; set data.tags to a CSV of image,tags")
    found, form = [] if problems is None else problems, []
    header, rows = _grid(path, form)
    image = _column(path, header, IMAGE_COLUMNS, "image")
    column = _column(path, header, TAG_COLUMNS, "tags")
    rows = _whole_rows(path, header, rows, [c for c in (image, column) if c is not None], found)
    if column is None:
        tags = _marked(path, header, rows, image, classes, form)
    else:
        tags = _written([cells[column] for _, cells in rows], classes, str(path), form)
        names = [_heading(header[c]) for c in (image, column)]
        if names != ["image", "tags"]:
            form.append("with the columns {!r} and {!r}".format(*names))
    one_each = column is not None and max(map(len, tags), default=0) <= 1
    table: dict[str, list[str]] = {}
    again = []
    for (number, cells), names in zip(rows, tags, strict=True):
        name = unicodedata.normalize("NFC", cells[image])
        if name in table:
            again.append(name)
            if not one_each:
                found.append(f"{path}, line {number}: image {name} is listed twice")
        table[name] = list(dict.fromkeys([*(table.get(name, []) if one_each else []), *names]))
    if again and one_each:
        form.append(f"with one line per tag of an image, such as {again[0]}")
    if form:
        note(f"{path} is read as a table {', '.join(form)}", about=f"the form of {path}")
    if problems is None:
        raise_all(found, f"correct {path}")
    return table


def _heading(cell: str) -> str:
    return re.sub(r"[\s_-]+", "_", cell.strip().casefold())


def _grid(path: Path, form: list[str]) -> tuple[list[str], Rows]:
    """Headings and other rows of a table with any column separator."""
    text = read_text(path, "the tags", "save the table as CSV in UTF-8")
    text = re.sub(r"\A\s*sep=.\n", "\n", text)  # Excel's
    first = text.strip().partition("\n")[0]

    def known(header: list[str]) -> bool:
        return any(_heading(h) in names for h in header for names in IMAGE_COLUMNS)

    def columns(separator: str) -> int:
        cells = next(csv.reader([first], delimiter=separator, skipinitialspace=True), [])
        return len(cells) if known(cells) else 0

    separator = max(COLUMN_SEPARATORS, key=columns)  # the first of equals: commas
    if separator != ",":
        form.append(f"with columns separated by {COLUMN_SEPARATORS[separator]}")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        raise UserError(f"the tags {path} cannot be read ({error})") from None
    rows = [(number, cells) for number, cells in rows if any(cells)]
    if len(rows) < 2 or not known(rows[0][1]):
        raise UserError(f"{path} is not a table of tags; its first line must be: image,tags")
    return rows[0][1], rows[1:]


def _column(path: Path, header: list[str], known: Sequence[set[str]], what: str) -> int | None:
    """Index of the column of images or tags, by its heading."""
    for names in known:
        places = [k for k, heading in enumerate(header) if _heading(heading) in names]
        if len(places) > 1:
            both = " and ".join(repr(header[k]) for k in places[:2])
            raise UserError(f"{path}: {both} may both be `{what}`; rename the right one to {what}")
        if places:
            return places[0]
    return None


def _whole_rows(
    path: Path, header: list[str], rows: Rows, needed: list[int], problems: list[str]
) -> Rows:
    """Rows padded to the length of the header; broken ones become problems."""
    whole = []
    for number, cells in rows:
        cells = cells + [""] * (len(header) - len(cells))
        if len(cells) > len(header) or not cells[needed[0]]:
            problems.append(
                f"{path}, line {number}: expected one image and one cell of tags; put tags that "
                'hold commas in quotes: photo.jpg,"dog, cat"'
            )
        elif any("\n" in cells[k] and _items(cells[k]) is None for k in needed):
            problems.append(
                f"{path}, line {number}: a cell has several lines; a quote is not closed"
            )
        else:
            whole.append((number, cells))
    return whole


def _marked(
    path: Path, header: list[str], rows: Rows, image: int, classes: Collection[str], form: list[str]
) -> list[list[str]]:
    """The tags of each row of a table with a column of 0 and 1 for each class."""
    kept = [k for k, h in enumerate(header) if h and not h.startswith("Unnamed: ")]  # pandas'
    names = {k: class_name(header[k], str(path)) for k in kept if k != image}
    odd = {  # by column, the first cell that is neither 0 nor 1
        k: cells[k]
        for _, cells in reversed(rows)
        for k in names
        if cells[k].casefold() not in PRESENT | ABSENT
    }
    if odd and {*names.values()} & {*classes}:
        names = {k: name for k, name in names.items() if name in classes}
    wrong = [f"column {header[k]!r} holds {odd[k]!r}, not 0 or 1" for k in names if k in odd]
    tags = [[n for k, n in names.items() if c[k].casefold() in PRESENT] for _, c in rows]
    if wrong or not any(tags):
        raise UserError(
            f"{path} is not a table of tags; its first line must be: image,tags. Nor does it have "
            f"a column of 0 and 1 for each class: {wrong[0] if wrong else 'there is no 1'}"
        )
    shown = [*names.values()][:8]
    form.append(f"with a column for each class ({', '.join(shown)}{' ...' * (len(names) > 8)})")
    return tags


def _written(
    cells: list[str], classes: Collection[str], place: str, form: list[str]
) -> list[list[str]]:
    """The tags in each cell of one column."""
    lists = {cell: _items(cell) for cell in cells}
    separated = any(SEPARATORS.search(cell) for cell, items in lists.items() if items is None)
    tags, nothing = [], []
    for cell in cells:
        items = lists[cell]
        if items is None:
            words = cell.split()
            spaced = not separated and cell not in classes and {*words} <= {*classes}
            items = words if spaced else SEPARATORS.split(cell)
        names = [name for name in (class_name(item, place) for item in items) if name]
        kept = [n for n in names if n in classes or n.casefold() not in NO_TAG]
        nothing += [n for n in names if n not in kept]
        tags.append(list(dict.fromkeys(kept)))
    if any(items is not None for items in lists.values()):
        form.append("with lists in brackets as cells")
    if nothing:
        form.append(f"in which cells such as {nothing[0]!r} mean no tag ({len(nothing)} in all)")
    return tags


def _items(cell: str) -> list[str] | None:
    """The items, in quotes or not, of a list as Python, NumPy, JSON or a database writes it; None
    if the cell is not a list."""
    if cell[:1] + cell[-1:] not in ("[]", "{}", "()"):
        return None
    inner = cell[1:-1]
    quoted = QUOTED.findall(inner)
    if not quoted:
        return None if cell[0] == "(" else SEPARATORS.split(inner)
    rest = re.split(r"[\s,;|]+", QUOTED.sub(" ", inner))
    return [_unquoted(item) for item in quoted] + [item for item in rest if item]


def _unquoted(text: str) -> str:
    try:
        text = ast.literal_eval(text)
    except (SyntaxError, ValueError):  # a backslash without an escape, or a line break
        return text[1:-1]
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # JSON writes pairs


def read_annotation(path: Path) -> list[str]:
    """Names of the objects in an XML annotation of PASCAL VOC, difficult ones included.

    Raises:
        UserError: the file is missing or broken.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:
        raise UserError(f"annotation {path} cannot be read ({error})") from None
    # Direct children only: a person's head and hands are <part>s with their own names.
    names = (class_name(e.findtext("name", "")) for e in root.findall("object"))
    return list(dict.fromkeys(names))


def find_images(
    root: Path, setting: str = "data.root", skip: Path | None = None, problems: list | None = None
) -> dict[str, list[str]]:
    """Every photograph below `root`, as a relative path, with its first folder as its tag.

    A photograph directly in `root` has no tag. The folder `skip` (of masks) is left out, and so is
    what `core.data.finder.Files` leaves out. Names that are not UTF-8 are added to `problems`; if
    that is None, they raise one error. `setting` is what the user has to change if there is no
    image.

    Raises:
        UserError: there is no such folder, or no photograph in it.
    """
    files = Files(root, PHOTOGRAPHS, skip)
    if problems is None or not files.names:
        raise_all(files.problems, "rename these files")
    else:
        problems += files.problems
    if not files.names:
        kinds = ", ".join(PHOTOGRAPHS.suffixes)
        raise UserError(f"no image ({kinds}) was found below {root}; set {setting}")
    relative = [path.relative_to(root) for paths in files.names.values() for path in paths]
    return {
        p.as_posix(): [class_name(part, str(root)) for part in p.parts[:-1][:1]] for p in relative
    }


def folder_tags(
    root: Path,
    tags: str | None,
    masks: str | None,
    classes: Collection[str] = (),
    problems: list[str] | None = None,
) -> dict[str, list[str]]:
    """Tags of photographs below `root`: from the CSV file `tags` there (see `read_table`), or from
    their sub-folders if it is None. The folder `masks` below `root` holds no photographs."""
    if tags:
        return read_table(root / tags, classes, problems)
    return find_images(root, skip=root / masks if masks else None, problems=problems)
