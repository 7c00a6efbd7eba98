"""Class names of one source in terms of another's, and of folders of label maps."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from core.data.labels import BIASED_ON_DISK
from core.data.names import class_name, look_alikes
from core.run.errors import UserError, refuse
from core.run.files import read_json, read_text, user_path
from core.run.log import note
from core.run.stage import SIGNATURE, class_differences

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
MOST = BIASED_ON_DISK - 1
"""Classes that a label map can hold; 254 and 255 mean no class."""
NUMBERED = re.compile(r"(\d+)[\s:;,.)=-]+\S")


def check_names(names: Sequence[Any], place: str) -> None:
    """Refuses what cannot name the labels 1, 2, ... `place` says where the names are from.

    Raises:
        UserError: a name is not text, is empty or is there twice, or there are none or too many.
    """
    odd = [name for name in names if not isinstance(name, str) or not name.strip()]
    if odd:
        raise UserError(f"{place}: {odd[0]!r} is not a class name; correct it")
    if not names:
        raise UserError(f"{place}: there is none; name at least one class besides the background")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{place}: {twice!r} is there twice; rename one, or remove one")
    if len(names) > MOST:
        raise UserError(
            f"{place}: there are {len(names)} classes, and label maps can hold {MOST}; leave some "
            "out of the source, or join some there"
        )


def read_names(text: str) -> tuple[str, ...]:
    """Class names from a file with one a line, or from a list separated by commas.

    A first name that means the background is left out, with a note: it is label 0 everywhere.

    Raises:
        UserError: there is none, or one twice; there are too many; numbers are written before them;
            or one is empty, other than at the end.
    """
    path, is_file = user_path(text), False
    with suppress(OSError):  # a list may be longer than any name of a file
        is_file = path.is_file()
    if is_file:
        lines = read_text(path, "the class names").splitlines()
    elif "," in text or not (path.suffix or "/" in text):
        lines = text.split(",")
    else:
        raise UserError(f"the file of class names {path} is missing")
    place, names = f"class names {text}", [class_name(line, text) for line in lines]
    while names and not names[-1]:
        names.pop()
    if "" in names:
        # Left out, it would give every later name the number before its own.
        raise UserError(
            f"{place}: name {names.index('') + 1} is empty; remove the empty line, or write the "
            "class that belongs there"
        )
    numbers = [int(found[1]) for found in map(NUMBERED.match, names) if found]
    rising = all(low < high for low, high in pairwise(numbers))
    if numbers and len(numbers) == len(names) and numbers[0] in (0, 1) and rising:
        raise UserError(
            f"{place}: {names[0]!r} begins with a number; write one name per line, in the order "
            "of the labels 1, 2, ..., without numbers"
        )
    if names and names[0].casefold() in EMPTY:
        note(f"{names[0]!r}, the first class name of {text}, is label 0; label 1 is the second")
        names = names[1:]
    check_names(names, place)
    return tuple(names)


def read_signature(folder: Path) -> dict[str, Any]:
    """The made_from.json of a folder of label maps; empty if there is none.

    Raises:
        UserError: it is damaged: there is no list of class names in it.
    """
    path = folder / SIGNATURE
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("classes"), list):
        raise UserError(
            f"{path} is damaged: it has no list of classes; make the label maps again, or remove "
            "the file and give --classes"
        )
    check_names(content["classes"], f"{path} is damaged: its classes")
    return content


def names_of(folder: Path, given: str | None) -> tuple[str, ...]:
    """The class names of a folder of label maps: those given, or what its made_from.json says.

    Raises:
        UserError: neither says them, they contradict each other, made_from.json is damaged, or
            `tools/import_labels.py` has not finished the folder.
    """
    path, made_from = folder / SIGNATURE, read_signature(folder)
    if made_from.get(UNFINISHED):
        raise UserError(f"{folder} is not finished: run the same tools/import_labels.py again")
    if not given and not made_from:
        raise UserError(f"{path} is missing; give the class names with --classes")
    if not given:
        return tuple(made_from["classes"])
    names = read_names(given)
    refuse(
        f"--classes contradict {path}",
        class_differences(made_from.get("classes"), names),
        "leave out --classes; or remove that file, if it is not of these label maps",
    )
    return names


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
