import cv2
import numpy as np
import pytest
import torch
from conftest import CLASSES, run_python

from core.data.labels import read_label
from core.data.lists import Split, ground_truth, label_files, read_split
from core.data.loader import (
    PIXELS,
    LabelledImages,
    StepSampler,
    balanced_weights,
    batches_by_size,
)
from core.data.settings import AugmentConfig, DataConfig
from core.data.transforms import MEAN, TrainingView, denormalise, normalise
from core.run.errors import UserError


def config(root, **changes) -> DataConfig:
    return DataConfig(root=str(root), classes=tuple(CLASSES), **changes)


@pytest.fixture
def copy(tiny_data, tmp_path):
    """A data set that a test may break."""
    import shutil

    shutil.copytree(tiny_data, tmp_path / "data")
    return tmp_path / "data"


def test_tags_are_the_classes_of_the_masks(tiny_data):
    split = read_split(config(tiny_data), "train")
    assert len(split) == 16 and split.read_image(0).shape == (128, 128, 3)
    for row, path in zip(split.tags, ground_truth(config(tiny_data), split), strict=True):
        shown = set(np.unique(read_label(path, len(CLASSES)))) - {0}
        assert shown == set(row.nonzero()[0] + 1)


def test_same_seed_draws_the_same_pictures(tiny_data, tmp_path):
    root = tmp_path / "again"
    run_python(
        "tools/data/make_demo_dataset.py", "--root", root, "--train", 3, "--val", 1, "--seed", 3
    )
    for folder in ("JPEGImages", "SegmentationClass", "Annotations"):
        for path in (root / folder).iterdir():
            assert path.read_bytes() == (tiny_data / folder / path.name).read_bytes()


def test_other_data_in_the_folder_is_refused(tiny_data):
    done = run_python("tools/data/make_demo_dataset.py", "--root", tiny_data, "--seed", 4)
    assert done.returncode == 1 and "holds another data set" in done.stderr


def test_all_missing_images_are_told_together(copy):
    for name in ("train_00001", "train_00002"):
        (copy / "JPEGImages" / f"{name}.jpg").unlink()
    with pytest.raises(UserError, match=r"(?s)2 problems.*train_00001.*train_00002"):
        read_split(config(copy), "train")


def test_missing_list_and_empty_list_are_refused(copy):
    with pytest.raises(UserError, match="other.txt is missing"):
        read_split(config(copy, val_list="other"), "val")
    (copy / "ImageSets" / "Segmentation" / "other.txt").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        read_split(config(copy, val_list="other"), "val")


@pytest.mark.parametrize(
    ("ids", "message"), [("../secret", "plain path"), ("train_00000\ntrain_00000", "twice")]
)
def test_ids_that_climb_out_or_repeat_are_refused(copy, ids, message):
    (copy / "ImageSets" / "Segmentation" / "odd.txt").write_text(ids)
    with pytest.raises(UserError, match=message):
        read_split(config(copy, train_list="odd"), "train")


def test_unknown_class_and_broken_annotation_are_told_together(copy):
    (copy / "Annotations" / "train_00000.xml").write_text("<annotation><obj")
    path = copy / "Annotations" / "train_00001.xml"
    path.write_text(path.read_text().replace("<name>", "<name>uni"))
    with pytest.raises(UserError, match=r"(?s)2 problems.*cannot be read.*class 'uni"):
        read_split(config(copy), "train")


def test_missing_label_maps_are_counted(tiny_data, tmp_path):
    split = read_split(config(tiny_data), "train")
    with pytest.raises(UserError, match="16 of 16 label maps are missing"):
        label_files(tmp_path, split, "make them")


def test_training_items_hold_no_label_unless_given_one(tiny_data):
    split = read_split(config(tiny_data), "train")
    augment = AugmentConfig(crop=48)
    blind = LabelledImages(split, None, len(CLASSES), augment)[0, 7]
    assert set(blind["label"].unique().tolist()) == {0}
    padded = LabelledImages(split, None, len(CLASSES), AugmentConfig(crop=240))[0, 7]
    outside = padded["label"] == 255
    assert set(padded["label"].unique().tolist()) == {0, 255}
    assert (padded["image"][:, outside] == 0).all() and (padded["image"][:, ~outside] != 0).any()
    masks = ground_truth(config(tiny_data), split)
    seen = LabelledImages(split, masks, len(CLASSES), augment)
    first, again, other = seen[0, 7], seen[0, 7], seen[0, 8]
    assert torch.equal(first["image"], again["image"]) and not torch.equal(
        first["image"], other["image"]
    )
    assert torch.equal(first["label"], again["label"]) and first["label"].shape == (48, 48)


def test_view_moves_image_and_label_together():
    label = torch.zeros(40, 60, dtype=torch.int64)
    label[10:30, 20:40] = 3
    image = (label == 3).to(torch.uint8).expand(3, -1, -1) * 255
    view = TrainingView(AugmentConfig(crop=64, jitter=(0, 0, 0, 0)))
    for seed in range(5):
        pixels, moved = view(image, label, seed)
        bright = denormalise(pixels)[0] > 127
        inside = moved != 255
        assert ((moved == 3) == bright)[inside].float().mean() > 0.97
        assert (pixels[:, ~inside] == 0).all()  # padding is the mean colour


def test_long_side_replaces_the_scale_at_any_size_of_photographs():
    augment = AugmentConfig(crop=100, flip=False, jitter=(0, 0, 0, 0), long_side=(40, 60))
    assert augment.unused() == ["scale"] and not AugmentConfig().unused()
    view, widths = TrainingView(augment), []
    for seed in range(20):
        size = (30, 20 * (1 + seed))
        image, label = torch.zeros(3, *size, dtype=torch.uint8), torch.zeros(size).long()
        inside = view(image, label, seed)[1] != 255
        widths.append(max(inside.any(0).sum().item(), inside.any(1).sum().item()))
    assert 40 <= min(widths) < 45 and 55 < max(widths) <= 60
    with pytest.raises(UserError, match="augment.long_side needs low <= high"):
        AugmentConfig(long_side=(60, 40))


def test_normalisation_is_undone_exactly():
    image = torch.arange(0, 256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    assert torch.equal(denormalise(normalise(image)), image)
    grey = torch.tensor(MEAN).view(3, 1, 1) * 255
    assert normalise(grey).abs().max() < 1e-6


CPU = torch.device("cpu")


def test_batches_hold_images_of_one_size_as_far_as_memory_goes(tiny_data, monkeypatch):
    split = read_split(config(tiny_data), "val")
    batches = [(k, images.shape) for k, images in batches_by_size(split, range(6), CPU)]
    assert batches == [([0, 1, 2, 3, 4, 5], (6, 3, 128, 128))]
    monkeypatch.setitem(PIXELS, "cpu", 16 * 128 * 128)
    doubled = [k for k, _ in batches_by_size(split, range(6), CPU, scale=2)]
    assert doubled == [[0, 1, 2, 3], [4, 5]]
    assert [k for k, _ in batches_by_size(split, [0], CPU, scale=9)] == [[0]]


def test_batches_do_not_depend_on_what_is_left_to_do(tiny_data, monkeypatch):
    monkeypatch.setitem(PIXELS, "cpu", 4 * 128 * 128)
    split = read_split(config(tiny_data), "val")
    assert [k for k, _ in batches_by_size(split, [5], CPU)] == [[4, 5]]
    assert not list(batches_by_size(split, [], CPU))


def test_images_of_one_size_share_a_batch_wherever_they_stand(tmp_path, monkeypatch):
    monkeypatch.setitem(PIXELS, "cpu", 2 * 8 * 24)
    for k, width in enumerate((16, 24, 16, 24, 16, 16)):
        cv2.imwrite(str(tmp_path / f"{k}.png"), np.full((8, width, 3), k, np.uint8))
    paths = tuple(tmp_path / f"{k}.png" for k in range(6))
    split = Split(tuple("012345"), paths, np.zeros((6, 1), bool))
    batches = {tuple(k): images.shape for k, images in batches_by_size(split, range(6), CPU)}
    assert batches == {(0, 2, 4): (3, 3, 8, 16), (5,): (1, 3, 8, 16), (1, 3): (2, 3, 8, 24)}
    assert [k for k, _ in batches_by_size(split, [3], CPU)] == [[1, 3]]


def test_draws_are_shuffled_epochs_and_a_function_of_the_step():
    draws = list(StepSampler(count=5, batch_size=3, iterations=5, seed=1))
    indices = [i for batch in draws for i, _ in batch]
    assert sorted(indices[:5]) == sorted(indices[5:10]) == list(range(5))
    assert list(StepSampler(5, 3, 5, seed=1, start=2)) == draws[2:]
    assert list(StepSampler(5, 3, 5, seed=2)) != draws


def test_balanced_epochs_draw_rare_classes_more_often():
    tags = np.zeros((100, 3), bool)
    tags[:90, 0], tags[90:99, 1], tags[98, 0] = True, True, True  # the last has none
    weights = balanced_weights(tags, 1)
    assert np.allclose(weights[[0, 90, 98]] / weights[0], [1, 91 / 9, 91 / 9])
    assert np.isclose(weights[99], weights[:99].mean()) and np.isclose(weights.mean(), 1)
    draws = [i for batch in StepSampler(100, 10, 10, 0, 0, weights) for i, _ in batch]
    counts = np.bincount(draws, minlength=100)
    assert (counts >= np.floor(weights)).all() and (counts <= np.ceil(weights)).all()
    assert abs(counts[:90].sum() - counts[90:99].sum()) <= 3
    assert [*StepSampler(100, 10, 15, 0, 12, weights)] == [
        *StepSampler(100, 10, 15, 0, 0, weights)
    ][12:]
    half = balanced_weights(tags, 0.5)
    assert np.isclose(half[90] / half[0], (91 / 9) ** 0.5)
    assert np.allclose(balanced_weights(tags, 0), 1)
    assert np.allclose(balanced_weights(np.zeros((4, 2), bool), 1), 1)


def test_empty_training_list_is_refused():
    with pytest.raises(UserError, match="empty"):
        StepSampler(0, 1, 1, 0)


@pytest.mark.parametrize("scale", [0.45, 0.64, 1.28, 1.5])
def test_label_maps_stay_aligned_with_resized_images(scale):
    """Rows numbered by their colour and by their label: half a pixel of difference would show."""
    rows = torch.arange(200)[:, None].expand(200, 160)
    view = TrainingView(
        AugmentConfig(scale=(scale, scale), crop=64, flip=False, jitter=(0, 0, 0, 0))
    )
    image, label = view(rows.expand(3, -1, -1).to(torch.uint8), rows.long(), seed=0)
    shown = denormalise(image)[0].double()
    seen = label < 200  # not padded
    assert (shown - label)[seen].mean().abs() < 0.1
