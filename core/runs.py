"""Where every artefact of an experiment lies, and the manifest that says how it was made.

    <run_dir>/uss/checkpoint.pth                      the features' network
    <run_dir>/wsss/checkpoint.pth, cams/, labels/     classifier, activation maps, pseudo labels
    <run_dir>/wsss/seeds/, pairs/                     what spreads the maps (irn, advcam, seam)
    <run_dir>/debias/centroids.npz, labels/           debiased centroids and labels
    <run_dir>/segmentation/<name>/checkpoint.pth      student and EMA teacher
    <run_dir>/evaluation/<name>/scores.json, predictions/

Each stage's folder holds `manifest.json`: configuration, git commit, versions, device, inputs,
time.
"""

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from core import distributed
from core.config import Config
from core.errors import UserError
from core.files import read_json, write_json
from core.logs import tell
from core.training import pick_device

FOR_SCORES = {"data.masks", "data.val_list", "data.biased_classes"}
"""Settings that change scores alone: what a stage reads of them is among its inputs."""
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

    def segmentation(self, name: str | None = None) -> Path:
        """Folder of one segmentation training; by default that of the configuration."""
        section = self.config.segmentation
        return self.folder / "segmentation" / (name or section.name or section.mode)

    def evaluation(self, name: str) -> Path:
        return self.folder / "evaluation" / name


class Stage:
    """The folder of one stage: refuses another configuration, resumes, and keeps the manifest.

    Args:
        folder: where the stage writes.
        name: of the stage, for messages.
        config: the whole configuration.
        identity: the sections and keys on which the stage's results depend, such as `data` or
        `seed`.
        inputs: what the stage reads: a name and the ids or files of each list. Ids count by name,
        label maps (.png) by content, other files by name and size.
        skipped: ids of images that are left out.

    Raises:
        UserError: the folder was made with another configuration or other inputs.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        config: Config,
        identity: Iterable[str],
        inputs: Mapping[str, Iterable[str | Path]],
        skipped: Iterable[str] = (),
    ):
        self.folder, self.name, self._config = folder, name, config
        everything = dataclasses.asdict(config)
        settings = _flatten({key: everything[key] for key in identity})
        self._path = folder / "manifest.json"
        self._lock = None if distributed.rank() else _lock(folder)
        self._began = time.monotonic()
        self._before = 0.0
        lists = {key: [_identity(v) for v in values] for key, values in inputs.items()}
        self.manifest: dict[str, Any] = {
            "stage": name,
            "finished": False,
            "seconds": 0.0,
            "settings": settings,
            "inputs": {k: {"count": len(v), "sha256": _hash(v)} for k, v in lists.items()},
            "skipped": [*skipped],
            "environment": environment(config),
            "results": {},
        }
        if self._path.exists():
            self._take_up(read_json(self._path))
        distributed.meet()  # all have read it
        self.save()
        tell(config, "stage", stage=name, folder=str(folder))

    def _take_up(self, earlier: dict[str, Any]) -> None:
        old, new = (
            {**m["settings"], **{f"input: {k}": v for k, v in m["inputs"].items()}}
            for m in (earlier, self.manifest)
        )
        begun = any(not p.name.startswith((".lock", "manifest")) for p in self.folder.iterdir())
        if not (begun or earlier["finished"]):
            return  # it stopped before there was anything, such as at its first batch
        lines = _differences(old, new)
        if lines:
            raise UserError(
                f"{self.folder} was made with other settings or inputs:\n{lines}\n"
                "Remedy: choose another run_dir, set these back, or remove the folder yourself"
            )
        self._before = earlier["seconds"]
        self.manifest["finished"] = earlier["finished"]
        self.manifest["results"] = earlier["results"]
        if self.finished:  # the versions that made the results, not those of a later look
            self.manifest["environment"] = earlier["environment"]

    @property
    def finished(self) -> bool:
        return self.manifest["finished"]

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
        distributed.meet()
        self.manifest["results"] = dict(results)
        self.save()
        self.manifest["finished"] = True
        self._write()
        self._tell()

    def _tell(self) -> None:
        chosen = {key: self.manifest[key] for key in ("stage", "seconds", "results")}
        tell(self._config, "finished", folder=str(self.folder), **chosen)

    def already_done(self) -> bool:
        """True, and says so, when an earlier call finished this stage."""
        if self.finished:
            print(f"{self.name}: finished earlier, in {self.folder}")
            self._tell()
        return self.finished


def check_upstream(folder: Path, section: str, config: Config) -> None:
    """Compares what an earlier stage was made with, where it has a manifest, with what is set now.

    Args:
        folder: of the earlier stage.
        section: of the configuration, the earlier stage's own.
        config: the whole configuration.

    Raises:
        UserError: they differ, so that the results would not be of these settings.
    """
    if not (folder / "manifest.json").exists():
        return
    there = read_json(folder / "manifest.json")["settings"]
    now = _flatten({section: dataclasses.asdict(config)[section]})
    old = {k: v for k, v in there.items() if k.startswith(f"{section}.")}
    lines = _differences(old, now)
    if lines:
        raise UserError(
            f"{folder}, which this stage reads, was made with other settings:\n{lines}\n"
            "Remedy: set these back, or make it again in another run_dir"
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first settings that differ, a line each; empty where none does."""
    # Settings that are newer than the folder: their defaults are what was done without them.
    defaults = {k: v for k, v in _flatten(dataclasses.asdict(Config())).items() if k in new}
    old = {**defaults, **old}
    differ = {k for k in {*old, *new} if _plain(old.get(k)) != _plain(new.get(k))}
    return "\n".join(
        f"  {k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in sorted(differ - FOR_SCORES)[:8]
    )


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


def _identity(value: str | Path) -> str:
    """What tells an input apart from another of the same name."""
    if not isinstance(value, Path):
        return value
    content = hashlib.sha256(value.read_bytes()).hexdigest() if value.suffix == ".png" else ""
    return f"{value.name} {value.stat().st_size} {content}"


def _hash(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(value: Any) -> Any:
    """JSON has no tuples."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
