"""The folder of a stage: identity, resuming, and the manifest that says how it was made.

Each stage's folder holds `manifest.json`: class names, settings, digests of all inputs, git commit,
versions, device, time; and `inputs.json`, every single input. Checkpoints, label maps, activation
maps and features carry a copy of what they were made from (`made_from`).
"""

import dataclasses
import fcntl
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.run import distributed
from core.run.device import pick_device
from core.run.errors import UserError
from core.run.files import read_json, write_json
from core.run.inputs import (
    Items,
    Stamps,
    input_differences,
    known_stamps,
    read_stamps,
    save_stamps,
    stamp,
    summary,
)
from core.run.log import emit
from core.run.settings import Runtime

SIGNATURE = "made_from.json"
"""In a folder of results that may be moved: class names, settings and inputs of its stage."""
SHOWN = 8
PACKAGES = ("torch", "torchvision", "timm", "numpy", "numba", "opencv-python-headless", "pillow")


@dataclass(frozen=True)
class Identity:
    """What a stage's results depend on."""

    classes: tuple[str, ...]  # class names; label c is the c-th
    settings: Mapping[str, Any]  # flat settings in use
    inputs: Mapping[str, Items]  # lists of what is read, by name; their order counts
    named: bool = True  # whether the results depend on the names and order of the classes
    open_inputs: frozenset[str] = field(default=frozenset())  # inputs whose items may come and go
    known_in: tuple[Path, ...] = ()  # folders of stages that may have noted the same files
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of settings that results may lack


class Stage:
    """The folder of one stage: refuses another identity, resumes, and keeps the manifest.

    Args:
        folder: folder that the stage writes to.
        name: title of the stage, for messages.
        runtime: settings of the run.
        identity: what the stage's results depend on.
        data: where the images come from, for the record.
        skipped: ids of images that are left out.
        elsewhere: how a user makes the stage write to another folder.

    Raises:
        UserError: the folder was made with other settings or from other inputs.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        runtime: Runtime,
        identity: Identity,
        data: str,
        skipped: Iterable[str] = (),
        elsewhere: str = "choose another run_dir",
    ):
        self.folder, self.name, self._runtime, self._identity = folder, name, runtime, identity
        self._elsewhere, self._path = elsewhere, folder / "manifest.json"
        self._lock = None if distributed.rank() else _lock(folder)
        self._began, self._before, looked = time.monotonic(), 0.0, time.time_ns()
        stamps = _stamps(folder, identity, runtime.workers)
        self.manifest: dict[str, Any] = {
            "stage": name,
            "finished": False,
            "seconds": 0.0,
            "seconds_identifying": round(time.monotonic() - self._began, 3),
            "classes": [*identity.classes],
            "settings": dict(identity.settings),
            "inputs": summary(stamps),
            "skipped": [*skipped],
            "data": data,
            "environment": environment(runtime),
            "results": {},
        }
        if self._path.exists():
            self._adopt(read_json(self._path), stamps)
        distributed.barrier()  # all have read it
        self.save()
        if distributed.rank() == 0:
            save_stamps(folder, stamps, looked)
        emit(runtime, "stage", stage=name, folder=str(folder))

    def _adopt(self, earlier: dict[str, Any], stamps: Stamps) -> None:
        """Continues from an earlier call's manifest if it has the same identity."""
        ours = (".lock", "manifest", "inputs.json")
        begun = any(not p.name.startswith(ours) for p in self.folder.iterdir())
        if not (begun or earlier["finished"]):
            return  # it stopped before it wrote anything
        lines = _differences(self.folder, earlier, self._identity, stamps)
        if lines:
            raise UserError(
                f"{self.folder} is stale: it was made with other settings or inputs:\n"
                f"{listed(lines)}\n"
                f"Remedy: set these back, {self._elsewhere}, or remove the folder yourself and run "
                f"again: {shlex.join(['python', *sys.argv])}"
            )
        self._before = earlier["seconds"]
        kept = ["finished", "results"]
        kept += ["environment", "seconds_identifying"] if earlier["finished"] else []
        self.manifest |= {key: earlier[key] for key in kept}

    @property
    def finished(self) -> bool:
        """Whether the stage has come to its end, in this call or before."""
        return self.manifest["finished"]

    @property
    def made_from(self) -> dict[str, Any]:
        """The identity as written into results that may be moved elsewhere."""
        keys = ("stage", "classes", "settings", "inputs")
        return json.loads(json.dumps({key: self.manifest[key] for key in keys}))

    def sign(self, folder: Path) -> None:
        """Writes `made_from.json` into a folder of results."""
        if distributed.rank() == 0:
            write_json(folder / SIGNATURE, self.made_from)

    def save(self) -> None:
        """Writes the manifest; the time counts all parts of a resumed stage."""
        spent = 0 if self.finished else time.monotonic() - self._began
        self.manifest["seconds"] = round(self._before + spent, 2)
        self._write()

    def _write(self) -> None:
        if distributed.rank() == 0:
            write_json(self._path, self.manifest)

    def finish(self, results: Mapping[str, Any]) -> None:
        """Notes the results and the end, once every process has done its part."""
        distributed.barrier()
        self.manifest["results"] = dict(results)
        self.save()
        self.manifest["finished"] = True
        self._write()
        self._report()

    def _report(self) -> None:
        chosen = {key: self.manifest[key] for key in ("stage", "seconds", "results")}
        emit(self._runtime, "finished", folder=str(self.folder), **chosen)

    def already_done(self) -> bool:
        """True, with a message, if an earlier call finished this stage."""
        if self.finished:
            print(f"{self.name}: finished earlier, in {self.folder}")
            self._report()
        return self.finished


def stale_lines(folder: Path, identity: Identity, workers: int, common: bool = False) -> list[str]:
    """What a stage's results were made from, compared with now: a line for each difference.

    The seed and other settings outside of sections belong to the stage that reads: trainings with
    different seeds may read the same labels.

    Args:
        folder: folder of a stage; one without a manifest is trusted.
        identity: identity of that stage as things are now; missing files are not compared.
        workers: number of reading threads.
        common: compare only items of the inputs that were there and are here.
    """
    path = folder / "manifest.json"
    if not path.exists():
        return []
    earlier = read_json(path)
    settings = {k: v for k, v in identity.settings.items() if "." in k}
    settings |= {key: value for key, value in earlier["settings"].items() if "." not in key}
    stamps = _stamps(folder, identity, workers)
    identity = dataclasses.replace(identity, settings=settings)
    return _differences(folder, earlier, identity, stamps, common)


def refuse_stale(folder: Path, identity: Identity, workers: int, script: str) -> None:
    """Compares what an earlier stage was made from with what it would be made from now.

    Args:
        folder, identity, workers: see `stale_lines`.
        script: name of the script that makes the folder.

    Raises:
        UserError: they differ, so that the results would not be of these settings and inputs.
    """
    lines = stale_lines(folder, identity, workers)
    if lines:
        raise UserError(
            f"{folder}, which this stage reads, is stale: it was made with other settings or "
            f"inputs:\n{listed(lines)}\n"
            "Remedy: set these back, or choose another run_dir or remove the folder yourself, "
            f"and run: python {script}, with the same --config and options"
        )


def check_classes(folder: Path, classes: Sequence[str]) -> None:
    """Compares the class names of a folder of label maps, if it has any.

    Raises:
        UserError: they differ in names or order, so that labels would be taken for others.
    """
    path = folder / SIGNATURE
    line = class_difference(read_json(path)["classes"], classes) if path.is_file() else None
    if line:
        raise UserError(
            f"the label maps of {folder} were made with other classes:\n  {line}\n"
            "Remedy: set data.classes to the names and the order of these label maps "
            f"({path.name} there lists them), or make them again"
        )


def _stamps(folder: Path, identity: Identity, workers: int) -> Stamps:
    """Stamps of all inputs; files that any stage of the run has noted are not read again."""
    return stamp(identity.inputs, known_stamps(*identity.known_in, folder), workers)


def _differences(
    folder: Path,
    earlier: Mapping[str, Any],
    identity: Identity,
    stamps: Stamps,
    common: bool = False,
) -> list[str]:
    """A line for each difference between a manifest and an identity."""
    if "classes" not in earlier:
        return ["an earlier version of this code made it and did not record its inputs"]
    classes = class_difference(earlier["classes"], identity.classes) if identity.named else None
    lines = [classes] if classes else []
    lines += setting_differences(earlier["settings"], identity.settings, identity.defaults)
    there = read_stamps(folder)[1]
    if summary(there) == earlier["inputs"]:
        lines += input_differences(there, stamps, identity.open_inputs, common)
    elif not common:  # the list of items is lost
        here = summary(stamps)
        differ = [k for k in here if earlier["inputs"].get(k) != here[k]]
        lines += [f"{name}: another content" for name in differ]
    return lines


def class_difference(there: Sequence[str] | None, here: Sequence[str]) -> str | None:
    """The first difference between two orders of class names; None if equal or unknown."""
    if there is None or tuple(there) == tuple(here):
        return None
    for label, (a, b) in enumerate(zip(there, here, strict=False), 1):
        if a != b:
            return f"classes: label {label} is {a!r} there, {b!r} now"
    return f"classes: {len(there)} there, {len(here)} now"


def setting_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[str]:
    """A line for each setting that differs.

    A result may be older than a setting; it then counts as made with the default.
    """
    old = {**{k: v for k, v in defaults.items() if k in new}, **old}

    def plain(value: Any) -> Any:  # JSON has no tuples
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    differ = sorted(k for k in {*old, *new} if plain(old.get(k)) != plain(new.get(k)))
    # Another method has other settings; naming the change of method is enough.
    differ = [k for k in differ if k in old and k in new] or differ
    shown = (
        (k, *(repr(plain(side[k])) if k in side else "not used" for side in (old, new)))
        for k in differ
    )
    return [f"{k}: {there} there, {here} now" for k, there, here in shown]


def listed(lines: Sequence[str]) -> str:
    """The first lines, indented, and a count of the rest."""
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join(f"  {line}" for line in [*lines[:SHOWN], *more])


def _lock(folder: Path):
    """An open file whose lock ends with this process, however it ends.

    Raises:
        UserError: another process is at work in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another process is at work in {folder}; wait for it, or choose another run_dir"
        ) from None
    return file


def environment(runtime: Runtime) -> dict[str, Any]:
    """What the results may depend on besides the settings."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "packages": versions,
        "machine": f"{platform.system()} {platform.machine()}",
        "commit": _commit(),
        "device": str(pick_device(runtime)),
        "seed": runtime.seed,
    }


def _commit() -> str | None:
    """The git commit of this code, with a plus sign if files were changed; None outside git."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    commands = (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain"])
    try:
        commit, changed = (
            subprocess.run([*git, *command], capture_output=True, text=True).stdout.strip()
            for command in commands
        )
    except OSError:
        return None
    return commit + ("+" if changed else "") if commit else None
