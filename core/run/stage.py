"""Where every artefact of an experiment lies, and the manifest that says how it was made.

    <run_dir>/uss/checkpoint.pth                      the features' network
    <run_dir>/wsss/checkpoint.pth, cams/, labels/     classifier, activation maps, pseudo labels
    <run_dir>/wsss/seeds/, pairs/                     what spreads the maps (irn, advcam, seam)
    <run_dir>/debias/centroids.npz, labels/           debiased centroids and labels
    <run_dir>/segmentation/<name>/checkpoint.pth      student and EMA teacher
    <run_dir>/evaluation/<name>/scores.json, predictions/

Each stage's folder holds `manifest.json`: class names, settings, digests of all inputs, git commit,
versions, device, time; and `inputs.json`, every input by itself. Label maps, activation maps and
features carry a copy of what they were made from, `made_from.json`; checkpoints have it inside.
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.config import Config
from core.data.finder import FEATURES, LABELS, Files, Kind
from core.data.splits import Split, masks_folder
from core.run import distributed
from core.run.errors import UserError
from core.run.files import read_json, write_json
from core.run.identity import (
    Identity,
    Items,
    Stamps,
    class_difference,
    debias_identity,
    input_differences,
    known_stamps,
    read_stamps,
    save_stamps,
    setting_differences,
    stamp,
    summary,
    uss_identity,
    wsss_identity,
)
from core.run.log import emit
from core.run.loop import pick_device

SIGNATURE = "made_from.json"
"""In a folder of results that may be moved: class names, settings and inputs of its stage."""
SHOWN = 8
PACKAGES = ("torch", "torchvision", "timm", "numpy", "numba", "opencv-python-headless", "pillow")


class Run:
    """The paths of one experiment."""

    def __init__(self, config: Config):
        self.config = config
        self.folder = Path(config.run_dir)

    @property
    def uss(self) -> Path:
        return self.folder / "uss"

    @property
    def wsss(self) -> Path:
        return self.folder / "wsss"

    @property
    def wsss_labels(self) -> Path:
        """Stage 2's pseudo labels, or anybody's."""
        return Path(self.config.wsss.labels_dir or self.wsss / "labels")

    @property
    def debias(self) -> Path:
        return Path(self.config.debias.output_dir or self.folder / "debias")

    def features(self, split: Split) -> Items:
        """Anybody's feature files, or the network of stage 1 that computes features."""
        folder = self.config.uss.features_dir
        if folder:
            return dict(zip(split.ids, paths_of(Path(folder), FEATURES, split), strict=True))
        return {"checkpoint": self.uss / "checkpoint.pth"}

    def debias_identity(self, split: Split) -> Identity:
        """What stage 3 reads, from wherever it is configured to."""
        labels = paths_of(self.wsss_labels, LABELS, split)
        return debias_identity(self.config, split, labels, self.features(split))

    def segmentation(self, name: str | None = None) -> Path:
        """Folder of one segmentation training; by default that of the configuration."""
        section = self.config.segmentation
        return self.folder / "segmentation" / (name or section.name or section.mode)

    @property
    def training_labels(self) -> Path:
        """Folder of the label maps that the configured mode of stage 4 trains on."""
        section = self.config.segmentation
        if section.mode == "supervised":
            return masks_folder(self.config.data) or Path()
        if section.labels_dir:
            return Path(section.labels_dir)
        return self.wsss_labels if section.mode == "wsss" else self.debias / "labels"

    def evaluation(self, name: str) -> Path:
        return self.folder / "evaluation" / name


class Stage:
    """The folder of one stage: refuses another identity, resumes, and keeps the manifest.

    Args:
        folder: where the stage writes.
        name: title of the stage, for messages.
        config: the whole configuration.
        identity: what the stage's results depend on.
        skipped: ids of images that are left out.
        elsewhere: how a user makes the stage write to another folder.

    Raises:
        UserError: the folder was made with other settings or from other inputs.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        config: Config,
        identity: Identity,
        skipped: Iterable[str] = (),
        elsewhere: str = "choose another run_dir",
    ):
        self.folder, self.name, self._config, self._identity = folder, name, config, identity
        self._elsewhere = elsewhere
        self._path = folder / "manifest.json"
        self._lock = None if distributed.rank() else _lock(folder)
        self._began = time.monotonic()
        self._before = 0.0
        looked = time.time_ns()
        stamps = stamp(identity.inputs, _known(folder, config), config.workers)
        identified = time.monotonic() - self._began
        self.manifest: dict[str, Any] = {
            "stage": name,
            "finished": False,
            "seconds": 0.0,
            "seconds_identifying": round(identified, 3),
            "classes": [*identity.classes],
            "settings": dict(identity.settings),
            "inputs": summary(stamps),
            "skipped": [*skipped],
            "data": config.data.root,
            "environment": environment(config),
            "results": {},
        }
        if self._path.exists():
            self._take_up(read_json(self._path), stamps)
        distributed.barrier()  # all have read it
        self.save()
        if distributed.rank() == 0:
            save_stamps(folder, stamps, looked)
        emit(config, "stage", stage=name, folder=str(folder))

    def _take_up(self, earlier: dict[str, Any], stamps: Stamps) -> None:
        ours = (".lock", "manifest", "inputs.json")
        begun = any(not p.name.startswith(ours) for p in self.folder.iterdir())
        if not (begun or earlier["finished"]):
            return  # it stopped before there was anything, such as at its first batch
        lines = _differences(self.folder, earlier, self._identity, stamps)
        if lines:
            raise UserError(
                f"{self.folder} is stale: it was made with other settings or inputs:\n"
                f"{_listed(lines)}\n"
                f"Remedy: set these back, {self._elsewhere}, or remove the folder yourself and run "
                f"again: {shlex.join(['python', *sys.argv])}"
            )
        self._before = earlier["seconds"]
        self.manifest["finished"] = earlier["finished"]
        self.manifest["results"] = earlier["results"]
        if self.finished:  # what made the results, not a later look at them
            for key in ("environment", "seconds_identifying"):
                self.manifest[key] = earlier[key]

    @property
    def finished(self) -> bool:
        return self.manifest["finished"]

    @property
    def made_from(self) -> dict[str, Any]:
        """The identity as it is written into results that may leave the folder."""
        keys = ("stage", "classes", "settings", "inputs")
        return json.loads(json.dumps({key: self.manifest[key] for key in keys}))

    def sign(self, folder: Path) -> None:
        """Writes `made_from.json` into a folder of results."""
        if distributed.rank() == 0:
            write_json(folder / SIGNATURE, self.made_from)

    def save(self) -> None:
        """Writes the manifest; the time counts all parts of a resumed stage."""
        if not self.finished:
            self.manifest["seconds"] = round(self._before + time.monotonic() - self._began, 2)
        else:
            self.manifest["seconds"] = self._before
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
        self._tell()

    def _tell(self) -> None:
        chosen = {key: self.manifest[key] for key in ("stage", "seconds", "results")}
        emit(self._config, "finished", folder=str(self.folder), **chosen)

    def already_done(self) -> bool:
        """True, and says so, when an earlier call finished this stage."""
        if self.finished:
            print(f"{self.name}: finished earlier, in {self.folder}")
            self._tell()
        return self.finished


def paths_of(folder: Path, kind: Kind, split: Split) -> list[Path]:
    """The file of each image in a folder, whether or not it is there."""
    return [*map(Files(folder, kind).of_id, split.ids)]


def stale(folder: Path, identity: Identity, config: Config, common: bool = False) -> list[str]:
    """How a stage's folder differs from what its results would be made from now, line by line.

    The seed and other settings of no section are the reader's own: several trainings with different
    seeds may read the same labels.

    Args:
        folder: folder of a stage; one without a manifest is believed.
        identity: identity of that stage, as things are now; files that are gone are not compared.
        config: configuration of the run, in whose folders times of files are noted.
        common: compare only items of the inputs that were there and are here.
    """
    path = folder / "manifest.json"
    if not path.exists():
        return []
    earlier = read_json(path)
    shared = [key for key in earlier["settings"] if "." not in key]
    settings = {k: v for k, v in identity.settings.items() if "." in k}
    settings |= {key: earlier["settings"][key] for key in shared}
    stamps = stamp(identity.inputs, _known(folder, config), config.workers)
    identity = dataclasses.replace(identity, settings=settings)
    return _differences(folder, earlier, identity, stamps, common)


def check_upstream(folder: Path, identity: Identity, config: Config, script: str) -> None:
    """Compares what an earlier stage was made from with what it would be made from now.

    Args:
        folder, identity, config: see `stale`.
        script: what makes the folder.

    Raises:
        UserError: they differ, so that the results would not be of these settings and inputs.
    """
    lines = stale(folder, identity, config)
    if lines:
        raise UserError(
            f"{folder}, which this stage reads, is stale: it was made with other settings or "
            f"inputs:\n{_listed(lines)}\n"
            f"Remedy: set these back, or choose another run_dir or remove the folder yourself, and "
            f"run: python {script}, with the same --config and options"
        )


def check_upstream_of(config: Config, split: Split, *stages: str) -> None:
    """`check_upstream` for those of the stages "uss", "wsss" and "debias" that are this run's.

    Args:
        config: the whole configuration; folders from elsewhere are not compared.
        split: the training list.
        stages: which.
    """
    for folder, identity, script in own_stages(config, split, *stages):
        check_upstream(folder, identity, config, script)


def own_stages(config: Config, split: Split, *stages: str) -> Iterator[tuple[Path, Identity, str]]:
    """Folder, identity as things are now, and script of each named stage that is this run's own;
    arguments as of `check_upstream_of`."""
    run = Run(config)
    if "wsss" in stages and not config.wsss.labels_dir:
        yield run.wsss, wsss_identity(config, split), "train_wsss.py"
    if "uss" in stages and not config.uss.features_dir:
        yield run.uss, uss_identity(config, split), "train_uss.py"
    if "debias" in stages:
        yield run.debias, run.debias_identity(split), "make_debiased_labels.py"


def check_classes(folder: Path, classes: Sequence[str]) -> None:
    """Compares the class names of a folder of label maps, where it names any.

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


def _known(folder: Path, config: Config) -> dict[str, Any]:
    """Times and digests of files that any stage of the run has noted."""
    run = Run(config)
    return known_stamps(run.uss, run.wsss, run.debias, run.segmentation(), folder)


def _differences(
    folder: Path,
    earlier: Mapping[str, Any],
    identity: Identity,
    stamps: Stamps,
    common: bool = False,
) -> list[str]:
    """A line for each difference between a manifest and an identity."""
    if "classes" not in earlier:
        return ["an earlier version of this code made it, and did not note from what"]
    classes = class_difference(earlier["classes"], identity.classes) if identity.named else None
    lines = [classes] if classes else []
    lines += setting_differences(earlier["settings"], identity.settings)
    there = read_stamps(folder)[1]
    if summary(there) == earlier["inputs"]:
        lines += input_differences(there, stamps, identity.open, common)
    elif not common:  # the list of items is lost
        here = summary(stamps)
        differ = [k for k in here if earlier["inputs"].get(k) != here[k]]
        lines += [f"{name}: another content" for name in differ]
    return lines


def _listed(lines: Sequence[str]) -> str:
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


def environment(config: Config) -> dict[str, Any]:
    """What the results may depend on beside the settings."""
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
        "device": str(pick_device(config)),
        "seed": config.seed,
    }


def _commit() -> str | None:
    """The git commit of this code, with a plus sign when files were changed; None outside git."""
    here = Path(__file__).resolve().parent
    try:
        head = subprocess.run(
            ["git", "-C", here, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True
        )
        changed = subprocess.run(
            ["git", "-C", here, "status", "--porcelain"], capture_output=True, text=True
        )
    except OSError:
        return None
    commit = head.stdout.strip()
    return commit + ("+" if changed.stdout.strip() else "") if commit else None
