"""Archives for VOC's server: what tools/submit_voc.py packs, and what the check refuses."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import run_inside
from PIL import Image

from core.data.labels import write_label
from core.run.errors import UserError
from tools.submit_voc import check_submission, member, write_submission

IDS = [f"2008_{k:06}" for k in range(6)]
TEST, VAL = "comp6_test_cls", "comp6_val_cls"


@pytest.fixture
def predictions(tmp_path) -> list[Path]:
    """Label maps with all labels, of two sizes, and VOC's folder with their photographs."""
    rng, voc = np.random.default_rng(0), tmp_path / "VOC2012"
    for folder in ("JPEGImages", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    for name in ("test", "val"):
        (voc / f"ImageSets/Segmentation/{name}.txt").write_text("\n".join(IDS) + "\n")
    for k, image_id in enumerate(IDS):
        label = rng.integers(0, 21, (30 + k % 2, 40)).astype(np.uint8)
        write_label(tmp_path / "predictions" / f"{image_id}.png", label)
        Image.new("RGB", label.shape[::-1]).save(voc / f"JPEGImages/{image_id}.jpg")
    return sorted((tmp_path / "predictions").iterdir())


@pytest.fixture
def archive(predictions, tmp_path) -> Path:
    write_submission(tmp_path / f"{TEST}.tar.gz", TEST, predictions)
    return tmp_path / f"{TEST}.tar.gz"


def check(archive: Path, *arguments):
    voc = archive.parent / "VOC2012"
    done = run_inside("tools/submit_voc.py", "--check", archive, "--voc", voc, *arguments)
    assert "Traceback" not in done.stderr
    return done


def test_own_archive_is_accepted_and_has_the_tree_of_the_server(archive, predictions):
    done = check(archive)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(": 6 predictions, nothing wrong\n")
    with tarfile.open(archive) as file:
        assert file.getnames() == [f"results/VOC2012/Segmentation/{TEST}/{i}.png" for i in IDS]
        for path in predictions:
            assert file.extractfile(member(TEST, path.stem)).read() == path.read_bytes()


def test_equal_inputs_give_equal_bytes(archive, predictions, tmp_path):
    for path in predictions:
        os.utime(path, (1, 1))
    write_submission(tmp_path / "later" / "other.tar.gz", TEST, predictions[::-1])
    assert (tmp_path / "later" / "other.tar.gz").read_bytes() == archive.read_bytes()
    assert [p.name for p in (tmp_path / "later").iterdir()] == ["other.tar.gz"]


def test_archive_packed_by_hand_is_accepted(predictions, tmp_path):
    with tarfile.open(tmp_path / f"{VAL}.tar", "w") as file:
        folder = tarfile.TarInfo("./results")
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
        for path in predictions:
            file.add(path, "./" + member(VAL, path.stem))
    check_submission(tmp_path / f"{VAL}.tar", VAL, IDS)


def test_sizes_are_unchecked_where_photographs_are_missing(archive):
    (archive.parent / f"VOC2012/JPEGImages/{IDS[0]}.jpg").unlink()
    done = check(archive)
    assert done.returncode == 0 and "nothing wrong; 1 sizes unchecked" in done.stdout


def png(image: Image.Image, kind: str = "PNG") -> bytes:
    image.save(file := io.BytesIO(), kind)
    return file.getvalue()


def indexed(label: int, height: int = 30, width: int = 40) -> bytes:
    image = Image.fromarray(np.full((height, width), label, np.uint8))
    image.putpalette(bytes(768))
    return png(image)


FIRST = member(TEST, IDS[0])
DEFECTS = {
    "missing": ({FIRST: None}, "2008_000000.png is missing"),
    "of no image": ({member(TEST, "2008_999999"): indexed(1)}, "2008_999999.png does not belong"),
    "another file": ({"results/readme.txt": b"x"}, "readme.txt does not belong there"),
    "in colour": ({FIRST: png(Image.new("RGB", (40, 30)))}, "mode RGB, not an indexed PNG"),
    "grey": ({FIRST: png(Image.new("L", (40, 30)))}, "mode L, not an indexed PNG"),
    "a GIF": ({FIRST: png(Image.new("P", (40, 30)), "GIF")}, "GIF of mode P"),
    "too small": ({FIRST: indexed(1, 30, 39)}, "is 39x30, its image 40x30"),
    "turned": ({FIRST: indexed(1, 40, 30)}, "is 30x40, its image 40x30"),
    "ignored pixels": ({FIRST: indexed(255)}, r"holds label 255; only 0\.\.20"),
    "label 21": ({FIRST: indexed(21)}, r"holds label 21; only 0\.\.20"),
    "truncated": ({FIRST: indexed(1)[:-30]}, "cannot be decoded"),
    "empty": ({FIRST: b""}, "cannot be decoded"),
}


def repack(archive: Path, changes: dict[str, bytes | None]) -> None:
    """Packs an archive again with other, further or (None) fewer members."""
    with tarfile.open(archive) as file:
        content = {m.name: file.extractfile(m).read() for m in file}
    with tarfile.open(archive, "w:gz") as file:
        for name, data in (content | changes).items():
            if data is not None:
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                file.addfile(entry, io.BytesIO(data))


SIZES = {image_id: (30 + k % 2, 40) for k, image_id in enumerate(IDS)}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_is_refused(archive, defect):
    changes, message = DEFECTS[defect]
    repack(archive, changes)
    with pytest.raises(UserError, match=rf"(?s)1 problem with.*{message}"):
        check_submission(archive, TEST, IDS, SIZES)


def test_all_defects_are_told_together(archive):
    changes = {member(TEST, IDS[1]): None, FIRST: indexed(255), "readme.txt": b"x"}
    repack(archive, changes)
    done = check(archive)
    assert done.returncode == 1 and "3 problems" in done.stderr
    for name in (IDS[0], IDS[1], "readme.txt", f"submit_voc.py --competition {TEST}"):
        assert name in done.stderr


def test_prediction_that_stands_twice_or_is_a_link_is_refused(archive, predictions):
    with tarfile.open(archive, "w") as file:
        for path in [*predictions[1:], predictions[2]]:
            file.add(path, member(TEST, path.stem))
        link = tarfile.TarInfo(FIRST)
        link.type, link.linkname = tarfile.SYMTYPE, str(predictions[0])
        file.addfile(link)
    with pytest.raises(UserError, match=r"(?s)2 problems.*000002.png.*twice.*000000.png"):
        check_submission(archive, TEST, IDS)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_truncated_archive_is_refused(archive, predictions, share, suffix):
    if suffix == "tar":
        with tarfile.open(archive, "w") as file:
            for path in predictions:
                file.add(path, member(TEST, path.stem))
    data = archive.read_bytes()
    end = len(data) if suffix == "tar.gz" else 512 * 3 * len(IDS)
    archive.write_bytes(data[: int(share * end)])
    with pytest.raises(UserError, match="is damaged|is missing"):
        check_submission(archive, TEST, IDS, SIZES)


def test_overwritten_archive_is_refused(archive):
    data = bytearray(archive.read_bytes())
    for start in range(20, len(data) - 40, len(data) // 12):
        archive.write_bytes(data[:start] + b"\x5a" * 40 + data[start + 40 :])
        with pytest.raises(UserError):
            check_submission(archive, TEST, IDS, SIZES)


def test_folder_of_another_competition_is_refused(archive):
    done = check(archive, "--competition", "comp5_test_cls")
    assert done.returncode == 1 and "12 problems" in done.stderr
    assert f"{FIRST} does not belong there" in done.stderr


def test_competition_and_list_are_told_by_the_name(archive):
    other = archive.rename(archive.with_name("mine.tar.gz"))
    done = check(other)
    assert done.returncode == 1 and "give --competition" in done.stderr
    assert check(other, "--competition", TEST).returncode == 0
    (archive.parent / "VOC2012/ImageSets/Segmentation/test.txt").unlink()
    done = check(other, "--competition", TEST)
    assert done.returncode == 1 and "test.txt is missing; set --voc" in done.stderr
    done = check(archive)
    assert done.returncode == 1 and "missing" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tools/submit_voc.py",), "give --competition, one of comp5_test_cls"),
        (("tools/submit_voc.py", "--check", "a.tar"), "--check and --voc are given together"),
        (("evaluate.py", "--submission", "comp7_test_cls"), "no competition 'comp7_test_cls'"),
        (("evaluate.py", "--submission", TEST), "give --data.val_list test"),
    ],
)
def test_incomplete_or_unknown_submission_is_refused(arguments, message):
    done = run_inside(*arguments)
    assert done.returncode == 1 and message in done.stderr
