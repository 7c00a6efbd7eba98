"""Class names as people write them: unifies spellings of one name and warns about look-alikes."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping

from core.run.log import note, warn

# The joiners (200c, 200d) belong in words of other scripts, but not after ASCII or at an end.
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]"
    "|(?:^|(?<=[\x00-\x7f]))[\u200c\u200d]+|[\u200c\u200d]+$"
)
LETTERS = str.maketrans("асеорхуѕіјԁԛԝһӏουνικρχα", "aceopxysijdqwhlouvikpxa")
"""Cyrillic and Greek letters that look like Latin ones."""
ACCENTS = re.compile("[\u0300-\u036f]")
BACKGROUND_NAMES = {"background", "bg", "void", "unlabeled", "unlabelled", "ignore"}


def class_name(text: str, place: str = "the class names") -> str:
    """A class name in Unicode's composed form (NFC), without invisible characters and with single
    spaces; a change is noted once for each `place`, the source of the name."""
    name = " ".join(unicodedata.normalize("NFC", INVISIBLE.sub("", text)).split())
    if name != text.strip(" \t\r\n"):
        note(
            f"{place}: names are read without invisible characters and surplus spaces, in composed "
            f"form, such as {ascii(text)} as {name!r}",
            about=f"names in {place}",
        )
    return name


def warn_of_names(names: Iterable[str], counts: Mapping[str, int] | None = None) -> None:
    """Warns of classes that are probably one class or several, and of one that is the background;
    `counts` are the numbers of images of each class, if known."""
    names = [*names]
    for group in look_alikes(names):
        shown = [repr(n) if n.isascii() else f"{n!r} = {ascii(n)}" for n in group]
        if counts:
            shown = [f"{text} ({counts[n]} in all)" for text, n in zip(shown, group, strict=True)]
        warn(
            f"the classes {', '.join(shown[:-1])} and {shown[-1]} look alike and are counted as "
            f"{len(group)} classes; if they are one, spell it the same way everywhere in the tags"
        )
    joined = [name for name in names if " " in name and {*name.split()} <= {*names}]
    if joined:
        warn(
            f"the words of {', '.join(map(repr, joined[:3]))} are themselves classes; if they are "
            "several tags, separate them by semicolons, or name the classes in data.classes"
        )
    for name in names:
        if _likeness(name).strip("_") in BACKGROUND_NAMES:
            warn(
                f"{name!r} is a class with its own number, but 0 is always the background; if it "
                "is not an object, remove it from the tags and from data.classes"
            )


def look_alikes(names: Iterable[str]) -> list[list[str]]:
    """Groups of names that differ only in capitals, spaces, hyphens, accents, a plural, or letters
    of other scripts, in the order of `names`."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[_likeness(name)].append(name)
    for key in [*alike]:
        stems = (key.removesuffix("s"), key.removesuffix("es"), re.sub("ies$", "y", key))
        for stem in stems:
            if stem != key and len(stem) > 2 and stem in alike and key in alike:
                alike[stem] += alike.pop(key)
    return [group for group in alike.values() if len(group) > 1]


def _likeness(name: str) -> str:
    """A key that look-alikes share."""
    key = unicodedata.normalize("NFKD", name).casefold().translate(LETTERS)
    key = re.sub("[\u200c\u200d\ufe0e\ufe0f]", "", ACCENTS.sub("", key))
    return re.sub(r"(?<=[^\W\d_])[\s_-]+(?=[^\W_])", "", key)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks like `name`, if there is one."""
    return next((k for k in known if look_alikes([k, name])), None)
