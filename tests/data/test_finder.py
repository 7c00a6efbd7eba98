"""Files found by their ids, whatever their names look like on the disk."""

import os
from unicodedata import normalize

import numpy as np
import pytest
from conftest import run_python
from PIL import Image

from core.data.finder import FEATURES, LABELS, PHOTOGRAPHS, Files, image_id
from core.data.lists import listed_id, read_split
from core.data.settings import DataConfig
from core.data.tags import find_images
from core.metrics import pair_folders, score_files
from core.run import log
from core.run.errors import UserError
from core.run.files import readable, user_path

COMPOSED, DECOMPOSED = (normalize(form, "Möwe") for form in ("NFC", "NFD"))


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(log, "printed", {})


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def save(path, value: int = 1, suffix: str = "PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(path, suffix)


def told() -> str:
    return "\n".join(log.printed.values())


@pytest.mark.parametrize("suffix", ["png", "PNG", "Png"])
def test_suffix_may_have_any_capitals(tmp_path, suffix):
    touch(tmp_path, f"dog/a.{suffix}")
    files = Files(tmp_path, LABELS)
    assert files.of_id("dog/a") == tmp_path / f"dog/a.{suffix}" and not told()


def test_what_is_left_out_is_told_in_one_line(tmp_path):
    touch(tmp_path, "a.jpg", "._a.jpg", ".b.jpg", ".DS_Store", "Thumbs.db", "notes.txt")
    touch(tmp_path, "@eaDir/a.jpg/THUMB.jpg", "__MACOSX/._a.jpg", ".cache/c.jpg")
    touch(tmp_path, "d.HEIC", "e.gif", "f.avif", "g.CR2")
    os.mkfifo(tmp_path / "pipe.jpg")  # reading it would wait for ever
    assert [*Files(tmp_path, PHOTOGRAPHS).ids] == ["a"]
    assert len(log.printed) == 1
    for part in (
        *("hidden files: 2", "hidden folders: 1", "system folders: 2 (@eaDir, ...)"),
        "kinds that are not read: 4 (.avif, .cr2, .gif, .heic)",
    ):
        assert part in told()


def test_links_are_followed_but_not_in_a_circle(tmp_path):
    touch(tmp_path, "real/a.png", "elsewhere/b.png", "elsewhere/c")
    (tmp_path / "real/town").symlink_to("../elsewhere")
    (tmp_path / "real/d.png").symlink_to("../elsewhere/c")
    for name, target in {"self": ".", "up": "..", "gone": "nowhere", "e.png": "e.png"}.items():
        (tmp_path / "real" / name).symlink_to(target)
    (tmp_path / "elsewhere/back").symlink_to("../real")
    files = Files(tmp_path / "real", LABELS)
    assert [*files.ids] == ["a", "d", "town/b", "up/elsewhere/b"]
    assert "links to nothing: 2" in told() and "links to a parent folder: " in told()


def test_photograph_with_two_names_is_warned_of(tmp_path):
    touch(tmp_path, "dog/a.jpg", "cat/b.jpg")
    (tmp_path / "cat/a.jpg").symlink_to("../dog/a.jpg")
    assert len(find_images(tmp_path)) == 3
    assert "such as cat/a.jpg and dog/a.jpg" in told() and told().count("warning: ") == 1


def test_name_that_is_not_utf_8_is_refused_readably(tmp_path):
    touch(tmp_path, "disc/a.jpg")
    with open(os.fsencode(tmp_path / "disc") + b"/K\xfcste.jpg", "wb"):  # noqa: PTH123
        pass
    with pytest.raises(UserError, match=r"disc/K\\xfcste.jpg is not UTF-8; rename it"):
        find_images(tmp_path)
    with pytest.raises(UserError, match=r"K\\xfcste.jpg is not UTF-8"):
        read_split(DataConfig(format="folder", root=str(tmp_path)).with_classes(), "train")
    assert readable("a\udcfc") == r"a\xfc"


@pytest.mark.parametrize(
    ("on_disk", "asked"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED), (DECOMPOSED, DECOMPOSED)]
)
def test_forms_of_unicode_are_one_name(tmp_path, on_disk, asked):
    touch(tmp_path, f"{on_disk}/{on_disk}.png")
    files = Files(tmp_path, LABELS)
    assert files.of_id(image_id(f"{asked}/{asked}.jpg")).is_file()


def test_two_files_of_one_id_are_refused_where_it_is_asked_for(tmp_path):
    touch(tmp_path, "a.png", "a.PNG", "b.png", f"{COMPOSED}.png", f"{DECOMPOSED}.png")
    files = Files(tmp_path, LABELS)
    assert files.every(["b"], "") == (tmp_path / "b.png",)
    for name in ("a", COMPOSED):
        with pytest.raises(UserError, match="are both label maps of"):
            files.of_id(name)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        *(("a.jpg", "a.JPG"), ("a", "a.JPG"), ("./a.JPG", "a.JPG"), ("b.jpg", "b.jpg")),
        *(("c.jpg", "c.jpg"), ("dog/d", "dog/d.webp")),
    ],
)
def test_photograph_is_found_as_people_write_it(tmp_path, written, expected):
    touch(tmp_path, "a.JPG", "b.jpg", "b.png", "c.png", "dog/d.webp")
    assert Files(tmp_path, PHOTOGRAPHS).named(written) == tmp_path / expected


def test_features_have_the_same_finder(tmp_path):
    touch(tmp_path, "dog/a.NPY", "dog/._a.npy", "b.npz")
    files = Files(tmp_path, FEATURES)
    assert files.every(["dog/a"], "") == (tmp_path / "dog/a.NPY",) and "(.npz)" in told()
    with pytest.raises(UserError, match="1 of 2 feature files are missing, first: .*b.npy; make"):
        files.every(["dog/a", "b"], "make it")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("p0", "p0"),
        ("p0.jpg", "p0"),
        ("p0  1", "p0"),
        ("my photo 1", "my photo 1"),
        ("JPEGImages/p0.jpg SegmentationClass/p0.png", "p0"),
        ("/JPEGImages/p0.jpg /SegmentationClassAug/p0.png", "p0"),
        ("JPEGImages/my photo 1.jpg\tSegmentationClass/my photo 1.png", "my photo 1"),
        ("/data/VOC2012/JPEGImages/p0.jpg", "p0"),
        ("/voc/p0.jpg", "p0"),
        (DECOMPOSED, COMPOSED),
        ("gone -1", "gone"),
        ("my gone photo", "my gone photo"),
        ("JPEGImages/../../p0.jpg", "../../p0"),
    ],
)
def test_line_of_a_list_names_a_photograph(tmp_path, line, expected):
    known = {"p0", "my photo 1", COMPOSED}
    assert listed_id(line.replace("/voc", str(tmp_path)), known, tmp_path) == expected


def test_every_mask_is_scored(tmp_path):
    """Masks of any capitals, in linked folders, and predictions that are found alike."""
    for name in ("a.png", "b.PNG", f"{COMPOSED}.png"):
        save(tmp_path / "masks" / name)
    save(tmp_path / "elsewhere/c.png")
    (tmp_path / "masks/town").symlink_to("../elsewhere")
    (tmp_path / "masks/._a.png").write_bytes(b"\0\5\x16\7")
    for name in ("a.PNG", "b.png", f"{DECOMPOSED}.Png", "town/c.png", "more.png"):
        save(tmp_path / "predictions" / name)
    pairs = pair_folders(tmp_path / "predictions", tmp_path / "masks")
    images = score_files(*pairs, ("1",), False, 0)["images"]
    assert images == {"scored": 4, "of": 4}
    assert "hidden files: 1" in told() and "without a mask: 1, such as more" in told()


def test_predictions_inside_of_the_masks_are_no_masks(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "predicted/a.png")
    assert pair_folders(tmp_path / "predicted", tmp_path)[1] == [tmp_path / "a.png"]


@pytest.mark.parametrize("option", ["--data.root=~/photos", "--uss.features_dir=~/features"])
def test_home_folder_is_meant_by_a_tilde_in_any_path(tmp_path, monkeypatch, option):
    from core.config import make_parser, parse

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("run_dir: ~/runs/mine\nwsss: {weights: ~/w.pth}\n")
    parser = make_parser("test", "test")
    parser.add_argument("--output", type=str | None)
    arguments = ["--config=~/mine.yaml", option, "--output=~/scores.json"]
    config, options = parse(parser, arguments)
    assert config.run_dir == f"{tmp_path}/runs/mine" and options.output == f"{tmp_path}/scores.json"
    assert config.wsss.weights == f"{tmp_path}/w.pth"
    assert str(tmp_path) in (config.data.root + str(config.uss.features_dir))
    with pytest.raises(UserError, match="no such home folder"):
        user_path("~nobody.here/photos")


def test_tools_know_the_home_folder(tmp_path):
    (tmp_path / "voc").mkdir()
    done = run_python(
        "tools/data/prepare_voc.py", "--voc=~/voc", env={**os.environ, "HOME": str(tmp_path)}
    )
    assert f"{tmp_path}/voc has no JPEGImages" in done.stderr


def test_photographs_that_are_not_used_are_told(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        save(tmp_path / name, suffix="JPEG")
    (tmp_path / "tags.csv").write_text("image,tags\na.jpg,dog\nb.jpg,\n")
    save(tmp_path / "masks/a.png")
    save(tmp_path / "masks/x.png")
    data = DataConfig(format="folder", root=str(tmp_path), tags="tags.csv", masks="masks")
    data = data.with_classes()
    assert read_split(data, "train").ids == read_split(data, "val").ids == ("a",)
    assert "not in " in told() and ": 1, such as c" in told()
    assert "without a tag, which are not used for training: 1, such as b" in told()
    assert "without a photograph: 1, such as x" in told()
