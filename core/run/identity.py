"""What a result was made from: class names, settings with influence, and the content of its inputs.

Every stage's folder keeps its identity in `manifest.json` and, item by item, in `inputs.json`;
checkpoints and folders that may be moved elsewhere carry a copy (`made_from`). Whoever reads a
result compares (core/run/stage.py). Paths do not count: an input is its content, wherever it is and
however its path is spelt.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from core.config import Config
from core.data.splits import Split
from core.run.errors import UserError
from core.run.files import read_json, write_json

Items = Mapping[str, str | Path]
"""What a stage reads, by id: a text, or a file whose content counts."""
Stamp = str | list
"""An item as recorded: its text; or size, time of writing, time of change and digest of a file."""
Stamps = dict[str, dict[str, Stamp | None]]
"""Stamps by name of the input and id; None: the file is missing."""
TICK = 2 * 10**9
"""Nanoseconds in which a file may change twice without a new time on some file systems."""

_STEGO = (
    *("code_dim", "iterations", "batch_size", "resolution", "lr", "samples", "neighbours"),
    *("dropout", "five_crops", "probe_clusters", "weights"),
    *(f"{value}_{pairs}" for value in ("weight", "shift") for pairs in ("intra", "inter")),
    *("weight_negative", "shift_negative"),
)
_CLASSIFIER = ("epochs", "batch_size", "optimizer", "lr", "head_lr", "weight_decay", "augment")
_PAIRS = ("epochs", "batch_size", "lr", "weight_decay", "augment")
_SPREADS = {"cam": None, "irn": "irn", "advcam": "irn", "seam": "psa", "rsepm": "irn"}

_UNUSED: tuple[tuple[str, Callable[[Config], bool], tuple[str, ...]], ...] = (
    ("uss", lambda c: True, ("preset", "cache", "features_dir")),  # the preset is its six values
    ("uss", lambda c: c.uss.method != "stego", _STEGO),
    ("uss", lambda c: c.uss.method != "leopart", ("leopart",)),
    ("uss", lambda c: not c.uss.self_supervised.iterations, ("self_supervised",)),
    ("wsss", lambda c: True, ("labels_dir",)),
    *(
        ("wsss", lambda c, m=method: c.wsss.method != m, (method,))
        for method in ("advcam", "seam", "rsepm")
    ),
    *(
        ("wsss", lambda c, s=section: _SPREADS[c.wsss.method] != s, (section,))
        for section in ("irn", "psa")
    ),
    ("wsss.irn", lambda c: bool(c.wsss.irn.weights), (*_PAIRS, "radius", "foreground")),
    ("wsss.irn", lambda c: bool(c.wsss.irn.weights), ("background", "crf")),
    ("wsss.psa", lambda c: bool(c.wsss.psa.weights), (*_PAIRS, "crf")),
    ("wsss.psa", lambda c: bool(c.wsss.psa.weights), ("low_exponent", "high_exponent")),
    ("wsss", lambda c: c.wsss.method in ("seam", "rsepm"), ("pooling", "norm", "frozen_stages")),
    ("wsss", lambda c: c.wsss.method == "seam", ("output_stride",)),
    ("wsss", lambda c: c.wsss.method == "advcam", ("scales", "flip")),
    (
        "wsss",
        lambda c: c.wsss.method != "cam",
        ("threshold", "object_share", "sharpness", "refine", "crf"),
    ),
    ("wsss", lambda c: c.wsss.object_share is not None, ("threshold",)),
    ("wsss", lambda c: c.wsss.refine == "none", ("sharpness", "crf")),
    ("wsss", lambda c: bool(c.wsss.weights), (*_CLASSIFIER, "pooling", "norm", "frozen_stages")),
    ("debias", lambda c: True, ("output_dir",)),
    ("debias", lambda c: c.debias.distance == "mean", ("nearest",)),
    ("debias", lambda c: c.debias.unary == "logistic", ("gamma",)),
    ("debias", lambda c: c.debias.unary == "gamma", ("threshold", "slope")),
    ("debias", lambda c: c.debias.refine == "none", ("crf",)),
    ("segmentation", lambda c: True, ("name", "labels_dir")),
    (
        "segmentation",
        lambda c: c.segmentation.mode not in ("complement", "mars"),
        ("warmup", "refine", "crf"),
    ),
    ("segmentation", lambda c: c.segmentation.refine != "crf", ("crf",)),
    (
        "segmentation",
        lambda c: c.segmentation.network != "deeplabv3plus",
        ("low_dim", "head_dropout"),
    ),
    ("segmentation", lambda c: c.segmentation.network != "deeplabv1", ("head_momentum",)),
    (
        "segmentation",
        lambda c: c.segmentation.network == "deeplabv2",
        ("aspp_dim", "dropout"),
    ),
    ("evaluation", lambda c: c.evaluation.refine == "none", ("crf",)),
)
"""Section, whether, and its keys that then change no result."""


def settings_with_influence(config: Config, *keys: str) -> dict[str, Any]:
    """The flat settings of these sections and keys that a result depends on.

    Left out are settings of methods that are not chosen, places to write to, and files of weights,
    which count as inputs (`weight_files`).
    """
    everything = dataclasses.asdict(config)
    unused = [f"{section}.{k}" for section, idle, names in _UNUSED if idle(config) for k in names]
    unused += _idle_weights(config)
    return {
        key: value
        for key, value in flatten({key: everything[key] for key in keys}).items()
        if not _is_file_of_weights(key, value)
        and not any(f"{key}.".startswith(f"{u}.") for u in unused)
    }


def weight_files(config: Config, section: str) -> dict[str, Path]:
    """Files of weights that a section names and the chosen methods use, by setting.

    Raises:
        UserError: one of them is missing.
    """
    found, idle = {}, _idle_weights(config)
    for key, value in flatten({section: dataclasses.asdict(config)[section]}).items():
        if _is_file_of_weights(key, value) and key not in idle:
            found[key] = Path(value)
            if not found[key].is_file():
                raise UserError(f"{key}: there is no file {value}; mend the path or the setting")
    return found


def _is_file_of_weights(key: str, value: Any) -> bool:
    return key.endswith(".weights") and value not in (None, "none", "timm")


def _idle_weights(config: Config) -> list[str]:
    """Settings of weights that nothing reads: a released network needs none of its backbone."""
    section = _SPREADS[config.wsss.method]
    pairs = section is None or getattr(config.wsss, section).weights
    idle = {
        "uss.backbone.weights": config.uss.weights,
        "uss.weights": config.uss.method != "stego",
        "wsss.backbone.weights": config.wsss.weights and pairs,
        "wsss.irn.weights": section != "irn",
        "wsss.psa.weights": section != "psa",
    }
    return [key for key, applies in idle.items() if applies]


@dataclass(frozen=True)
class Identity:
    """What a stage's results depend on."""

    classes: tuple[str, ...]
    """Class names; label c is the c-th."""
    settings: Mapping[str, Any]
    """Flat settings with influence."""
    inputs: Mapping[str, Items]
    """Lists of what is read, by name; their order counts."""
    named: bool = True
    """Whether the results depend on the names and order of the classes."""
    open: frozenset[str] = field(default=frozenset())
    """Inputs whose items may come and go; those that stay must stay the same."""


def uss_identity(config: Config, split: Split) -> Identity:
    """Stage 1 sees images alone."""
    inputs = {"images": _images(split), **_weights(config, "uss")}
    settings = settings_with_influence(config, "seed", "uss")
    return Identity(config.data.classes, settings, inputs, named=False)


def wsss_identity(config: Config, split: Split) -> Identity:
    """Stage 2 sees images and their tags."""
    inputs = {"images": _images(split), "tags": _tags(config, split), **_weights(config, "wsss")}
    settings = settings_with_influence(config, "seed", "accumulate", "sync_norm", "wsss")
    return Identity(config.data.classes, settings, inputs)


def debias_identity(
    config: Config, split: Split, labels: Sequence[Path], features: Items
) -> Identity:
    """Stage 3 sees images, tags, label maps and features.

    Args:
        config, split: of the training list.
        labels: the pseudo label of each image.
        features: the features of each image, or the network that computes them.
    """
    inputs = {"images": _images(split), "tags": _tags(config, split)}
    inputs |= {"labels": dict(zip(split.ids, labels, strict=True)), "features": features}
    return Identity(config.data.classes, settings_with_influence(config, "seed", "debias"), inputs)


def segmentation_identity(config: Config, split: Split, labels: Sequence[Path]) -> Identity:
    """Stage 4 sees images and label maps; the teacher also sees tags."""
    inputs = {"images": _images(split), "labels": dict(zip(split.ids, labels, strict=True))}
    if config.segmentation.mode in ("complement", "mars"):
        inputs["tags"] = _tags(config, split)
    settings = settings_with_influence(config, "seed", "accumulate", "sync_norm", "segmentation")
    return Identity(config.data.classes, settings, inputs | _weights(config, "segmentation"))


def prediction_identity(
    config: Config, split: Split, weights: Path, classes: tuple[str, ...], open_list: bool = False
) -> Identity:
    """Predictions see images and the trained network.

    Args:
        config: settings of test-time augmentation.
        split: images to predict.
        weights: checkpoint of the network, whose settings it holds.
        classes: class names of the network.
        open_list: whether images may come and go.
    """
    inputs = {"images": _images(split), "network": {"checkpoint": weights}}
    settings = settings_with_influence(config, "evaluation")
    return Identity(classes, settings, inputs, open=frozenset(["images"] if open_list else []))


def _images(split: Split) -> Items:
    return dict(zip(split.ids, split.images, strict=True))


def _tags(config: Config, split: Split) -> Items:
    names = config.data.classes
    rows = (";".join(names[k] for k in row.nonzero()[0]) for row in split.tags)
    return dict(zip(split.ids, rows, strict=True))


def _weights(config: Config, section: str) -> dict[str, Items]:
    files = weight_files(config, section)
    return {"weights": files} if files else {}


def stamp(
    inputs: Mapping[str, Items], known: Mapping[str, Mapping[str, Stamp]], workers: int = 0
) -> Stamps:
    """Identifies every item: a text by itself, a file by its content; None: the file is missing.

    Args:
        inputs: lists of items.
        known: `known_stamps`; a file with the size and times noted there is not read.
        workers: threads that read.
    """
    found: Stamps = {}
    unknown: list[tuple[str, str, Path, list]] = []
    for name, items in inputs.items():
        found[name] = {}
        for key, item in items.items():
            if not isinstance(item, Path):
                found[name][key] = item
                continue
            times, old = _times(item), known.get(name, {}).get(key)
            found[name][key] = old if times and old and old[:3] == times else None
            if times and found[name][key] is None:
                unknown.append((name, key, item, times))
    bar = {"desc": "reading inputs", "unit": "file", "disable": len(unknown) < 3000 or None}
    with ThreadPoolExecutor(max(1, workers)) as pool:
        digests = pool.map(lambda entry: _digest(entry[2]), unknown)
        for (name, key, _, times), digest in tqdm(
            zip(unknown, digests, strict=True), total=len(unknown), **bar
        ):
            found[name][key] = [*times, digest]
    return found


def _times(path: Path) -> list[int] | None:
    try:
        info = path.stat()
    except OSError:
        return None
    return [info.st_size, info.st_mtime_ns, info.st_ctime_ns]


def _digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def known_stamps(*folders: Path) -> Stamps:
    """Files that stages noted in these folders, joined; the last one counts most.

    Left out are files that may have changed once more within the tick of a clock in which they were
    read.
    """
    known: Stamps = {}
    for folder in folders:
        written, stamps = read_stamps(folder)
        for name, entries in stamps.items():
            settled = {
                key: stamp
                for key, stamp in entries.items()
                if isinstance(stamp, list) and max(stamp[1:3]) + TICK < written
            }
            known.setdefault(name, {}).update(settled)
    return known


def read_stamps(folder: Path) -> tuple[int, Stamps]:
    """What `save_stamps` wrote: the time and every item; nothing where that is lost."""
    try:
        content = read_json(folder / "inputs.json")
        return int(content["written"]), content["items"]
    except (UserError, KeyError, TypeError, ValueError):  # it spares work and names what differs
        return 0, {}


def save_stamps(folder: Path, stamps: Stamps, began: int) -> None:
    """Writes `<folder>/inputs.json`, unless it says the same already.

    Args:
        folder: folder of the stage.
        stamps: every item.
        began: time at which the first of them was looked at, nanoseconds since the epoch.
    """
    files = {n: {k: v for k, v in s.items() if isinstance(v, list)} for n, s in stamps.items()}
    if read_stamps(folder)[1] != stamps or known_stamps(folder) != files:
        write_json(folder / "inputs.json", {"written": began, "items": stamps}, indent=None)


def summary(stamps: Stamps) -> dict[str, dict[str, Any]]:
    """{name: {"count", "sha256"}} over all items, in their order."""
    return {name: {"count": len(items), "sha256": _joined(items)} for name, items in stamps.items()}


def _joined(items: Mapping[str, Stamp | None]) -> str:
    lines = (f"{key}\t{value_of(value)}" for key, value in items.items())
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def value_of(stamp: Stamp | None) -> str | None:
    """The part of a stamp that identifies an item: its text, or the digest of its content."""
    return stamp[-1] if isinstance(stamp, list) else stamp


def input_differences(
    old: Mapping[str, Mapping[str, Stamp]],
    new: Stamps,
    open_lists: frozenset[str] = frozenset(),
    common: bool = False,
) -> Iterator[str]:
    """One line for each input that is not the same, naming the first item.

    Args:
        old: stamps of the result.
        new: stamps of what there is now.
        open_lists: inputs whose items may come and go.
        common: compare only items that both have, in every input.
    """
    for name in dict.fromkeys((*old, *new)):
        there, here = old.get(name, {}), new.get(name, {})
        only_common = common or name in open_lists
        gone = [k for k in there if k not in here]
        come = [k for k in here if k not in there]
        if (gone or come) and not only_common:
            first = (gone or come)[0]
            yield (
                f"{name}: {len(here)} now, {len(there)} there; {len(come)} new and {len(gone)} "
                f"gone, first {first}"
            )
            continue
        both = [k for k in there if k in here and here[k] is not None]
        differ = [k for k in both if value_of(there[k]) != value_of(here[k])]
        if differ:
            first = differ[0]
            texts = isinstance(there[first], str) and isinstance(here[first], str)
            values = f": {there[first] or 'none'} there, {here[first] or 'none'} now"
            what = "differ" if texts else "have another content"
            yield f"{name}: {len(differ)} of {len(both)} {what}, first {first}" + (
                values if texts else ""
            )
        elif not only_common and [*there] != [*here]:
            yield f"{name}: the same items in another order"


def class_difference(there: Sequence[str] | None, here: Sequence[str]) -> str | None:
    """Where two orders of class names differ first; None where they are the same or unknown."""
    if there is None or tuple(there) == tuple(here):
        return None
    for label, (a, b) in enumerate(zip(there, here, strict=False), 1):
        if a != b:
            return f"classes: label {label} is {a!r} there, {b!r} now"
    return f"classes: {len(there)} there, {len(here)} now"


def setting_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line for each setting that differs."""
    # Settings that are newer than the result: their defaults are what was done without them.
    defaults = {k: v for k, v in flatten(dataclasses.asdict(Config())).items() if k in new}
    old = {**defaults, **old}
    differ = sorted(k for k in {*old, *new} if _plain(old.get(k)) != _plain(new.get(k)))
    # Another method has other settings; that it is another one says enough.
    differ = [k for k in differ if k in old and k in new] or differ
    return [f"{k}: {_shown(old, k)} there, {_shown(new, k)} now" for k in differ]


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return repr(_plain(settings[key])) if key in settings else "not used"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(value: Any) -> Any:
    """JSON has no tuples."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
