"""Lists of images in a folder of photographs."""

import numpy as np
import pytest
from PIL import Image

from core.config import Config
from core.data.lists import ground_truth, masks_folder, read_split
from core.data.settings import DataConfig
from core.run.errors import UserError
from core.segmenter import SegmentationConfig
from core.wsss.settings import WsssConfig
from tools.common.tables import write_table


def picture(height: int = 24, width: int = 40) -> np.ndarray:
    """Red above, black below."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2] = (200, 30, 30)
    return image


def save(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture() if image is None else image).save(path, **options)


def folder(root, **settings) -> DataConfig:
    return DataConfig(format="folder", root=str(root), **settings).with_classes()


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "webp", "bmp", "tif", "tiff"])
def test_image_of_any_suffix_is_read(tmp_path, suffix):
    save(tmp_path / "dog" / "deep" / f"a.{suffix}")
    split = read_split(folder(tmp_path), "train")
    assert split.ids == ("dog/deep/a",)
    image = split.read_image(0)
    assert image.dtype == np.uint8 and np.abs(image.astype(int) - picture()).mean() < 5


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "/secret.jpg", "dog/../../secret.jpg", "..\\a.jpg"]
)
def test_ids_that_climb_out_are_refused(tmp_path, name):
    save(tmp_path / "secret.jpg")
    save(tmp_path / "root" / "a.jpg")
    write_table(tmp_path / "root" / "tags.csv", {"a.jpg": ["dog"], name: ["dog"]})
    with pytest.raises(UserError, match=r"1 problem with.*\n.*not a plain path"):
        read_split(folder(tmp_path / "root", tags="tags.csv"), "train")


def test_two_images_with_one_id_are_refused(tmp_path):
    save(tmp_path / "dog" / "a.jpg")
    save(tmp_path / "dog" / "a.png")
    with pytest.raises(UserError, match=r"dog/a.jpg and dog/a.png would share a file of results"):
        read_split(folder(tmp_path), "train")


def test_names_that_differ_in_their_folder_are_two_images(tmp_path):
    for name in ("dog/a.jpg", "cat/a.png", "dog/a.b.jpg"):
        save(tmp_path / name)
    split = read_split(folder(tmp_path), "train")
    assert {*split.ids} == {"cat/a", "dog/a", "dog/a.b"} and split.tags.sum() == 3


@pytest.mark.parametrize("line", ["dog/a b", "dog/a b.jpg", "  dog/a b\r", "\ufeffdog/a b"])
def test_list_names_images_with_or_without_suffix(tmp_path, line):
    for name in ("dog/a b.jpg", "cat/c.jpg"):
        save(tmp_path / name)
    (tmp_path / "mine.txt").write_text(f"{line}\n\n", "utf-8")
    assert read_split(folder(tmp_path, train_list="mine"), "train").ids == ("dog/a b",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"dog/a\ndog/a.jpg\n", "dog/a is twice in the list"),
        (b"dog/a\ndog/gone\n", "dog/gone of .* has no tags"),
        (b"\n", "is empty"),
        (b"dog/\xe4\n", "save it as UTF-8"),
        (None, "mine.txt is missing; set data.train_list"),
    ],
)
def test_bad_list_is_refused(tmp_path, content, message):
    save(tmp_path / "dog" / "a.jpg")
    if content is not None:
        (tmp_path / "mine.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_split(folder(tmp_path, train_list="mine"), "train")


def test_second_column_of_a_voc_list_is_left_alone(tmp_path):
    save(tmp_path / "JPEGImages" / "a.jpg")
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Segmentation" / "train.txt").write_text("a  1\n")
    assert read_split(DataConfig(root=str(tmp_path)), "train", tagged=False).ids == ("a",)


def test_images_with_a_tag_are_trained_on_and_those_with_a_mask_scored(tmp_path):
    for name in ("dog/a.jpg", "dog/b.jpg", "untagged.jpg", "masks/dog/b.png", "masks/untagged.png"):
        save(tmp_path / name)
    data = folder(tmp_path, masks="masks")
    assert data.classes == ("dog",)
    assert read_split(data, "train").ids == ("dog/a", "dog/b")
    scored = read_split(data, "val")
    assert scored.ids == ("dog/b", "untagged") and scored.tags.tolist() == [[True], [False]]
    assert [p.is_file() for p in ground_truth(data, scored)] == [True, True]


def test_folder_without_masks_is_told_apart(tmp_path):
    save(tmp_path / "dog" / "a.jpg")
    data = folder(tmp_path)
    assert masks_folder(data) is None
    with pytest.raises(UserError, match="nothing to score"):
        read_split(data, "val")
    with pytest.raises(UserError, match="no masks to score with"):
        ground_truth(data, read_split(data, "train"))


def test_photographs_without_any_tag_are_refused(tmp_path):
    save(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="no image of .* has a tag"):
        folder(tmp_path)
    with pytest.raises(UserError, match="gives no image a tag"):
        read_split(folder(tmp_path, classes=("dog",)), "train")


def test_class_outside_of_the_given_ones_is_named(tmp_path):
    save(tmp_path / "dog" / "a.jpg")
    with pytest.raises(UserError, match="names class 'dog', which data.classes lacks"):
        read_split(folder(tmp_path, classes=("cat",)), "train")


@pytest.mark.parametrize("run_dir", ["", "runs", "dog/runs", "../photographs/runs"])
def test_results_inside_of_the_photographs_are_refused(tmp_path, run_dir):
    root = tmp_path / "photographs"
    save(root / "dog" / "a.jpg")
    with pytest.raises(UserError, match="is inside data.root"):
        Config(run_dir=str(root / run_dir), data=DataConfig(format="folder", root=str(root)))
    Config(run_dir=str(tmp_path / "runs"), data=DataConfig(format="folder", root=str(root)))


def test_labels_inside_of_the_photographs_are_refused(tmp_path):
    """Else the folder would be read as a class of its own."""
    data, inside = DataConfig(format="folder", root=str(tmp_path)), str(tmp_path / "labels")
    for labels in (
        {"wsss": WsssConfig(labels_dir=inside)},
        {"segmentation": SegmentationConfig(labels_dir=inside)},
    ):
        with pytest.raises(UserError, match="is inside data.root"):
            Config(data=data, **labels)
