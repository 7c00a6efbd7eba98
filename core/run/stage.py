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
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from core.run import distributed, inputs
from core.run.device import pick_device
from core.run.errors import UserError, refuse
from core.run.files import read_json, write_json
from core.run.log import emit
from core.run.settings import Runtime

SIGNATURE = "made_from.json"  # in results that may be moved: a stage's classes, settings, inputs
STALE = "is stale: it was made with other settings or inputs"
PACKAGES = ("torch", "torchvision", "timm", "numpy", "numba", "opencv-python-headless", "pillow")


@dataclass(frozen=True)
class Identity:
    """What a stage's results depend on."""

    classes: tuple[str, ...]  # class names; label c is the c-th
    settings: Mapping[str, Any]  # flat settings in use
    inputs: Mapping[str, inputs.Items]  # lists of what is read, by name; their order counts
    named: bool = True  # whether the results depend on the names and order of the classes
    # Inputs whose items may come and go, and those items that there are results of already.
    open_inputs: Mapping[str, Container[str]] = field(default_factory=dict)
    known_in: tuple[Path, ...] = ()  # folders of stages that may have noted the same files
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of settings that results may lack


@dataclass
class Stage:
    """The folder of one stage: refuses another identity, resumes, and keeps the manifest.

    Raises:
        UserError: the folder was made with other settings or from other inputs.
    """

    folder: Path
    name: str  # title, for messages
    runtime: Runtime
    identity: Identity
    data: str  # where the images come from, for the record
    skipped: Iterable[str] = ()  # ids of images that are left out
    elsewhere: str = "choose another run_dir"  # how a user makes the stage write to another folder

    def __post_init__(self):
        self._path = self.folder / "manifest.json"
        self._lock = None if distributed.rank() else _lock(self.folder)
        self._began, looked = time.monotonic(), time.time_ns()
        noted = (*self.identity.known_in, self.folder)
        stamps = inputs.stamp(self.identity.inputs, noted, self.runtime.workers)
        self.manifest: dict[str, Any] = {
            "stage": self.name,
            "finished": False,
            "seconds": 0.0,
            "seconds_identifying": round(time.monotonic() - self._began, 3),
            "classes": [*self.identity.classes],
            "settings": dict(self.identity.settings),
            "inputs": inputs.summary(stamps),
            "skipped": [*self.skipped],
            "data": self.data,
            "environment": environment(self.runtime),
            "results": {},
        }
        if self._path.exists():
            self._adopt(read_json(self._path), stamps)
        distributed.barrier()  # all have read it
        self.save()
        if distributed.rank() == 0:
            inputs.save_stamps(self.folder, stamps, looked)
        emit(self.runtime, "stage", stage=self.name, folder=str(self.folder))

    def _adopt(self, earlier: dict[str, Any], stamps: inputs.Stamps) -> None:
        """Continues from an earlier call's manifest if it has the same identity."""
        ours = (".lock", "manifest", "inputs.json")
        begun = any(not p.name.startswith(ours) for p in self.folder.iterdir())
        if not (begun or earlier["finished"]):
            return  # it stopped before it wrote anything
        refuse(
            f"{self.folder} {STALE}",
            _differences(self.folder, earlier, self.identity, stamps),
            f"set these back, {self.elsewhere}, or remove the folder yourself and run again: "
            + shlex.join(["python", *sys.argv]),
        )
        self._began -= earlier["seconds"]
        kept = ["finished", "results"]
        kept += ["environment", "seconds", "seconds_identifying"] if earlier["finished"] else []
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

    def save(self, **entries: Any) -> None:
        """Writes the manifest with these entries; the time counts all parts of a resumed stage."""
        if not self.finished:
            self.manifest["seconds"] = round(time.monotonic() - self._began, 2)
        self.manifest |= entries
        if distributed.rank() == 0:
            write_json(self._path, self.manifest)

    def finish(self, results: Mapping[str, Any]) -> None:
        """Notes the results and the end, once every process has done its part."""
        distributed.barrier()
        self.save(results=dict(results), finished=True)
        self._report()

    def _report(self) -> None:
        chosen = {key: self.manifest[key] for key in ("stage", "seconds", "results")}
        emit(self.runtime, "finished", folder=str(self.folder), **chosen)

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

    `identity` is that of the folder's stage as things are now. A folder without a manifest is
    trusted; missing files are not compared. With `common`, only items of the inputs that were
    there and are here are compared.
    """
    path = folder / "manifest.json"
    if not path.exists():
        return []
    earlier = read_json(path)
    settings = {k: v for k, v in identity.settings.items() if "." in k}
    settings |= {key: value for key, value in earlier["settings"].items() if "." not in key}
    stamps = inputs.stamp(identity.inputs, (*identity.known_in, folder), workers)
    identity = dataclasses.replace(identity, settings=settings)
    return _differences(folder, earlier, identity, stamps, common)


def check_classes(folder: Path, classes: Sequence[str]) -> None:
    """Compares the class names of a folder of label maps, if it has any.

    Raises:
        UserError: they differ in names or order, so that labels would be taken for others.
    """
    path = folder / SIGNATURE
    refuse(
        f"the label maps of {folder} were made with other classes",
        class_differences(read_json(path)["classes"], classes) if path.is_file() else (),
        "set data.classes to the names and the order of these label maps "
        f"({path.name} there lists them), or make them again",
    )


def _differences(
    folder: Path, earlier: dict, identity: Identity, stamps: inputs.Stamps, common: bool = False
) -> list[str]:
    """A line for each difference between a manifest and an identity."""
    if "classes" not in earlier:
        return ["an earlier version of this code made it and did not record its inputs"]
    lines = class_differences(earlier["classes"], identity.classes) if identity.named else []
    lines += setting_differences(earlier["settings"], identity.settings, identity.defaults)
    there = inputs.read_stamps(folder)[1]
    if inputs.summary(there) == earlier["inputs"]:
        lines += inputs.input_differences(there, stamps, identity.open_inputs, common)
    elif not common:  # the list of items is lost
        here = inputs.summary(stamps)
        differ = [k for k in here if earlier["inputs"].get(k) != here[k]]
        lines += [f"{name}: another content" for name in differ]
    return lines


def class_differences(there: Sequence[str] | None, here: Sequence[str]) -> list[str]:
    """The first difference between two orders of class names; none if `there` is unknown."""
    if there is None or tuple(there) == tuple(here):
        return []
    for label, (a, b) in enumerate(zip(there, here, strict=False), 1):
        if a != b:
            return [f"classes: label {label} is {a!r} there, {b!r} now"]
    return [f"classes: {len(there)} there, {len(here)} now"]


def setting_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[str]:
    """A line for each setting that differs.

    A result may be older than a setting; it then counts as made with the default.
    """
    old = {**{k: v for k, v in defaults.items() if k in new}, **old}
    old, new = json.loads(json.dumps([old, {**new}]))  # JSON has no tuples
    differ = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
    # Another method has other settings; naming the change of method is enough.
    differ = [k for k in differ if k in old and k in new] or differ
    there, here = ({k: repr(v) for k, v in side.items()} for side in (old, new))
    unused = "not used"
    return [f"{k}: {there.get(k, unused)} there, {here.get(k, unused)} now" for k in differ]


def _lock(folder: Path) -> IO:
    """An open file whose lock ends with this process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        message = f"another process is at work in {folder}; wait for it, or choose another run_dir"
        raise UserError(message) from None
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
    try:
        commit, changed = (
            subprocess.run([*git, *command.split()], capture_output=True, text=True).stdout.strip()
            for command in ("rev-parse --short=12 HEAD", "status --porcelain")
        )
    except OSError:
        return None
    return commit + ("+" if changed else "") if commit else None
