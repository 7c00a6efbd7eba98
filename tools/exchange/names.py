"""Class names of one source in terms of another's."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from core.data.names import class_name, look_alikes
from core.run.errors import UserError
from core.run.files import read_json, read_text, user_path
from core.run.log import note
from core.run.stage import SIGNATURE

SYNONYMS = (  # PASCAL VOC, COCO and what people write
    {"aeroplane", "airplane"},
    {"motorbike", "motorcycle"},
    {"sofa", "couch"},
    {"tvmonitor", "tv", "television"},
)
UNFINISHED = "unfinished"
"""In made_from.json while tools/import_labels.py writes label maps."""
EMPTY = {"background", "_background_", "__background__", "bg", "void", "unlabeled"}
"""Names of label 0, in lower case."""


def read_names(text: str) -> tuple[str, ...]:
    """Class names from a file with one a line, or from a list separated by commas.

    A first name that means the background is left out, with a note: it is label 0 everywhere.

    Raises:
        UserError: there is none, or one twice.
    """
    path = user_path(text)
    if path.is_file():
        lines = read_text(path, "the class names").splitlines()
    elif "," in text or not path.suffix:
        lines = text.split(",")
    else:
        raise UserError(f"the file of class names {path} is missing")
    names = tuple(name for name in (class_name(line, text) for line in lines) if name)
    if names and names[0].casefold() in EMPTY:
        note(f"{names[0]!r}, the first class name of {text}, is label 0; label 1 is the second")
        names = names[1:]
    twice = [name for name in names if names.count(name) > 1]
    if not names or twice:
        problem = f"{twice[0]!r} is there twice" if twice else "there is none"
        raise UserError(f"class names {text}: {problem}")
    return names


def names_of(folder: Path, given: str | None) -> tuple[str, ...]:
    """The class names of a folder of label maps: those given, or what its made_from.json says.

    Raises:
        UserError: neither says them, or `tools/import_labels.py` has not finished the folder.
    """
    path = folder / SIGNATURE
    made_from = read_json(path) if path.is_file() else {}
    if made_from.get(UNFINISHED):
        raise UserError(f"{folder} is not finished: run the same tools/import_labels.py again")
    if not given and not made_from:
        raise UserError(f"{path} is missing; give the class names with --classes")
    return read_names(given) if given else tuple(made_from["classes"])


def match(
    theirs: Sequence[str], ours: Sequence[str], given: Mapping[str, str] | None = None
) -> list[int]:
    """For each of their classes, the number of ours: 1..C, or 0 for one to leave out.

    A class has the same name, a spelling that looks alike, or a synonym.

    Args:
        theirs: names of the source.
        ours: names of the target.
        given: {their name: our name, or "" to leave it out}.

    Raises:
        UserError: a class matches none or several of ours, or a given name is unknown.
    """
    given = dict(given or {})
    for name, target in given.items():
        if name not in theirs or (target and target not in ours):
            unknown, known = (target, ours) if name in theirs else (name, theirs)
            raise UserError(f"--map: there is no class {unknown!r}; there are {', '.join(known)}")
    numbers, problems = [], []
    for name in theirs:
        found = [given[name]] if name in given else _candidates(name, ours)
        if len(found) != 1:
            options = f"may be {' or '.join(found)}" if found else "is none of ours"
            problems.append(f"{name!r} {options}")
            found = [""]
        numbers.append(ours.index(found[0]) + 1 if found[0] else 0)
    if problems:
        raise UserError(
            f"classes without a counterpart: {'; '.join(problems)}. Give --map THEIRS=OURS, or "
            f"--map THEIRS= to leave a class out. Ours: {', '.join(ours)}"
        )
    return numbers


def _candidates(name: str, ours: Sequence[str]) -> list[str]:
    if name in ours:
        return [name]
    alike = {other for group in look_alikes([name, *ours]) if name in group for other in group}
    alike |= {s for group in SYNONYMS if name.casefold() in group for s in group}
    return [other for other in ours if other in alike or other.casefold() in alike]


def table(theirs: Sequence[str], ours: Sequence[str], numbers: Sequence[int]) -> str:
    """The mapping in lines, for people."""
    width = max(map(len, theirs))
    rows = (
        f"  {name:{width}}  ->  {f'{k} {ours[k - 1]}' if k else 'left out'}"
        for name, k in zip(theirs, numbers, strict=True)
    )
    return "\n".join(rows)
