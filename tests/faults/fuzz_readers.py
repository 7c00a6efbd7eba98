"""Feeds every reader of files with damaged ones: no crash, no hang, no memory without bound.

    python tests/faults/fuzz_readers.py --seconds 1200 [--seed 0] [--only label image]

Each reader runs in a process of its own, with 2 GB beyond what it needs for its imports and 20
seconds for a file. A reader may return or raise UserError; anything else is a finding, whose file
is kept below --findings. Prints one line for each reader; ends with status 1 if there were any.
"""

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tarfile
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from core.config import make_parser, parse
from core.data.features import read_features
from core.data.images import read_image
from core.data.labels import VOC, read_label, write_label
from core.data.lists import gather
from core.data.settings import DataConfig
from core.data.tags import read_annotation, read_table
from core.run import checkpoint
from core.run.errors import UserError
from core.run.files import read_arrays, read_json
from core.wsss.cam import load_cam
from tools.data.archives import unpack
from tools.data.coco_annotations import group, read_instances
from tools.data.prepare_voc import read_sbd_mask
from tools.submit_voc import check_submission

MEMORY, PATIENCE = 2 << 30, 20  # bytes, seconds
NETWORK = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

Reader = tuple[Callable[[Path], list[Path]], Callable[[Path], object]]
"""Writes good files into a folder; reads one."""


def noise(height: int = 24, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)


def images(folder: Path) -> list[Path]:
    picture = Image.fromarray(noise())
    kinds = {"jpg": {}, "png": {}, "webp": {}, "bmp": {}, "tif": {}, "gif": {}}
    paths = [folder / f"a.{kind}" for kind in kinds]
    for path in paths:
        picture.save(path)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "b.jpg", progressive=True, exif=exif)
    picture.quantize(8).save(folder / "c.png", transparency=3)
    picture.convert("CMYK").save(folder / "d.jpg")
    picture.save(folder / "e.tif", compression="tiff_lzw")
    return [*paths, *(folder / n for n in ("b.jpg", "c.png", "d.jpg", "e.tif"))]


def labels(folder: Path) -> list[Path]:
    label = (noise()[..., 0] // 30).astype(np.uint8)
    write_label(folder / "a.png", label)
    Image.fromarray(label).save(folder / "b.png", optimize=True)
    Image.fromarray(label // 5).quantize(2).save(folder / "c.png", bits=1)
    Image.fromarray(VOC[label]).convert("RGBA").save(folder / "d.png")
    Image.fromarray(VOC[label]).quantize(16).save(folder / "e.png")
    Image.fromarray(label.astype(np.uint16)).save(folder / "f.png")
    return [folder / f"{n}.png" for n in "abcdef"]


def features(folder: Path) -> list[Path]:
    np.save(folder / "a.npy", np.ones((3, 4, 5), np.float16))
    np.save(folder / "b.npy", np.asfortranarray(np.ones((3, 4, 5), np.float64)))
    return [folder / "a.npy", folder / "b.npy"]


def clusters(folder: Path) -> list[Path]:
    arrays = {"vectors": np.ones((2, 3), np.float32), "labels": np.zeros(2, np.int16)}
    np.savez(folder / "a.npz", **arrays, sizes=np.ones(2, np.int64), cells=np.zeros((4, 4)))
    return [folder / "a.npz"]


def cams(folder: Path) -> list[Path]:
    np.savez(folder / "a.npz", keys=np.array([2, 5]), cam=np.ones((2, 4, 5), np.float16))
    return [folder / "a.npz"]


def tables(folder: Path) -> list[Path]:
    (folder / "a.csv").write_text('image,tags\na.jpg,dog;cat\n"b.jpg","dog, cat"\n', "utf-8-sig")
    return [folder / "a.csv"]


def annotations(folder: Path) -> list[Path]:
    body = "<object><name>dog</name><part><name>head</name></part></object>" * 3
    (folder / "a.xml").write_text(f"<annotation><filename>a.jpg</filename>{body}</annotation>")
    return [folder / "a.xml"]


def lists(folder: Path) -> list[Path]:
    (folder / "a.txt").write_text("2007_000032\n2007_000039 1\n\nname with spaces\n")
    return [folder / "a.txt"]


def read_list(path: Path) -> object:
    root = path.parent / "voc"
    place = root / "ImageSets/Segmentation/train.txt"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(path.read_bytes())
    return gather(DataConfig(root=str(root)), "train")


def checkpoints(folder: Path) -> list[Path]:
    content = {"network": NETWORK.state_dict(), "iteration": 3, "log": "[]"}
    checkpoint.save(folder / "a.pth", content)
    torch.save({"state_dict": NETWORK.state_dict(), "callbacks": nn.ReLU()}, folder / "b.ckpt")
    torch.save(NETWORK.state_dict(), folder / "c.pth", _use_new_zipfile_serialization=False)
    save_file(NETWORK.state_dict(), folder / "d.safetensors")
    return [folder / n for n in ("a.pth", "b.ckpt", "c.pth", "d.safetensors")]


def settings(folder: Path) -> list[Path]:
    text = "seed: 3\ndata: {classes: [a, b], biased_classes: [a]}\ndebias:\n  alpha: 0.4\n"
    (folder / "a.yaml").write_text(text + "wsss:\n  scales: [1.0, 2]\n  crf: &c {iterations: 3}\n")
    return [folder / "a.yaml"]


def read_settings(path: Path) -> object:
    try:
        return parse(make_parser("fuzz", ""), [f"--config={path}"])
    except SystemExit as error:  # how the parser of the command line tells its one message
        if isinstance(error.code, str) and error.code.startswith("error: "):
            return error.code
        raise


def archives(folder: Path) -> list[Path]:
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("in/a.txt", "text" * 100)
    for name, mode in (("b.tar", "w"), ("c.tgz", "w:gz"), ("d.tar.xz", "w:xz")):
        with tarfile.open(folder / name, mode) as file:
            member = tarfile.TarInfo("in/a.txt")
            member.size = 400
            file.addfile(member, io.BytesIO(b"text" * 100))
    return [folder / n for n in ("a.zip", "b.tar", "c.tgz", "d.tar.xz")]


def read_archive(path: Path) -> object:
    with tempfile.TemporaryDirectory(dir=path.parent) as target:
        count = unpack(path, Path(target), lambda name: name)
        outside = [p for p in path.parent.iterdir() if p.name == "in"]
        assert not outside, "a member was written outside its folder"
        return count


def submissions(folder: Path) -> list[Path]:
    write_label(folder / "one.png", labels_of_one())
    with tarfile.open(folder / "a.tar.gz", "w:gz") as file:
        file.add(folder / "one.png", "results/VOC2012/Segmentation/comp6_test_cls/one.png")
    return [folder / "a.tar.gz"]


def labels_of_one() -> np.ndarray:
    return np.zeros((8, 9), np.uint8)


def instances(folder: Path) -> list[Path]:
    box = {"image_id": 1, "category_id": 18, "iscrowd": 0, "area": 9.0, "bbox": [1, 1, 3, 3]}
    square = [[1, 1, 4, 1, 4, 4, 1, 4]]
    counts = {"counts": [10, 5, 65], "size": [8, 10]}
    content = {
        "images": [{"id": 1, "file_name": "COCO_train2014_000000000001.jpg", "height": 8}],
        "annotations": [
            {"id": 1, **box, "segmentation": square},
            {"id": 2, **box, "iscrowd": 1, "segmentation": counts},
        ],
        "categories": [{"id": 18, "name": "dog"}],
    }
    content["images"][0]["width"] = 10
    (folder / "a.json").write_text(json.dumps(content))
    return [folder / "a.json"]


def sbd_masks(folder: Path) -> list[Path]:
    from scipy.io import savemat

    content = np.zeros((1,), [("Segmentation", object)])
    content[0]["Segmentation"] = np.ones((6, 7), np.uint8)
    for name, packed in (("a.mat", True), ("b.mat", False)):
        savemat(folder / name, {"GTcls": content}, do_compression=packed)
    return [folder / "a.mat", folder / "b.mat"]


def read_in_a_process(path: Path) -> object:
    """As tools/data/prepare_voc.py reads it: scipy may crash."""
    try:
        return _reading().submit(read_sbd_mask, path).result()
    except BrokenProcessPool as error:
        _reading.cache_clear()
        raise UserError(str(error)) from None


@functools.cache
def _reading() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1)


def json_files(folder: Path) -> list[Path]:
    (folder / "a.json").write_text(json.dumps({"settings": {"a": [1, None, "ü"]}, "seconds": 1.5}))
    return [folder / "a.json"]


READERS: dict[str, Reader] = {
    "image": (images, read_image),
    "label": (labels, lambda path: read_label(path, 20)),
    "features": (features, read_features),
    "clusters": (clusters, lambda path: read_arrays(path, ("vectors", "cells"), "remove it")),
    "cams": (cams, load_cam),
    "tags": (tables, read_table),
    "annotation": (annotations, read_annotation),
    "list": (lists, read_list),
    "checkpoint": (checkpoints, checkpoint.load),
    "foreign checkpoint": (checkpoints, checkpoint.load_foreign),
    "weights": (checkpoints, lambda path: checkpoint.load_weights(NETWORK, path)),
    "configuration": (settings, read_settings),
    "archive": (archives, read_archive),
    "submission": (
        submissions,
        lambda path: check_submission(path, "comp6_test_cls", ["one"], num_classes=20),
    ),
    "instances": (instances, lambda path: group(read_instances(path), "train")),
    "sbd mask": (sbd_masks, read_in_a_process),
    "json": (json_files, read_json),
}


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One to four random injuries of a file."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        size = len(data)
        if not size:
            return bytes(data)
        start = rng.randrange(size)
        length = min(size - start, rng.choice((1, 2, 4, 8, 64)))
        kind = rng.randrange(7)
        if kind == 0:
            data[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[start : start + length] = rng.randbytes(length)
        elif kind == 2:
            data[start : start + length] = rng.choice((b"\0", b"\xff", b"9")) * length
        elif kind == 3:
            del data[start:]
        elif kind == 4:
            del data[start : start + length]
        elif kind == 5:
            data[start:start] = data[start : start + length] * rng.choice((1, 2, 50))
        else:
            other = rng.randrange(size)
            data[start : start + length] = data[other : other + length]
    return bytes(data)


def injuries(paths: list[Path], rng: random.Random) -> Iterator[tuple[str, bytes]]:
    while True:
        path = rng.choice(paths)
        yield path.name, damaged(path.read_bytes(), rng)


def processor_time() -> float:
    """Of this process and of those that it waited for, seconds."""
    return sum(os.times()[:4])


def work(name: str, seed: int, seconds: float, findings: Path, report) -> None:
    """Reads damaged files for so many seconds of processor time; sends (files, refusals)."""
    warnings.simplefilter("ignore")
    make, read = READERS[name]
    rng = random.Random(f"{seed} {name}")
    counts = {"files": 0, "refused": 0}

    def too_long(*_) -> None:
        raise TimeoutError(f"over {PATIENCE} s")

    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory() as scratch:
        good = Path(scratch) / "good"
        good.mkdir()
        paths = make(good)
        for path in paths:
            with contextlib.suppress(UserError):  # objects beside the tensors
                read(path)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        end = processor_time() + seconds
        for kind, content in injuries(paths, rng):
            if processor_time() > end:
                break
            path = Path(scratch) / kind
            path.write_bytes(content)
            counts["files"] += 1
            kept = findings / f"{name} {counts['files']} {kind}"
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(content)  # it stays if the process dies
            signal.alarm(PATIENCE)
            try:
                read(path)
            except UserError:
                counts["refused"] += 1
            except BaseException:  # noqa: BLE001 (whatever it is, it is a finding)
                signal.alarm(0)
                kept.with_name(f"{kept.name}.txt").write_text(traceback.format_exc())
                continue
            finally:
                signal.alarm(0)
            kept.unlink()
    report.send(counts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1200, help="of processor time in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=READERS, default=[*READERS])
    parser.add_argument("--findings", type=Path, default=Path("runs/fuzz"))
    options = parser.parse_args()
    context, total = multiprocessing.get_context("spawn"), 0
    for name in options.only:
        receiver, sender = context.Pipe(duplex=False)
        share = options.seconds / len(options.only)
        arguments = (name, options.seed, share, options.findings, sender)
        process = context.Process(target=work, args=arguments)
        process.start()
        sender.close()
        try:
            counts = receiver.recv()
        except EOFError:
            counts = None
        process.join()
        found = [*options.findings.glob(f"{name} [0-9]*")] if options.findings.is_dir() else []
        total += sum(path.suffix != ".txt" for path in found)
        told = f"{counts['files']} files, {counts['refused']} refused" if counts else "died"
        print(
            f"{name}: {told}, {sum(path.suffix != '.txt' for path in found)} findings", flush=True
        )
    if total:
        sys.exit(f"{total} findings in {options.findings}")


if __name__ == "__main__":
    main()
