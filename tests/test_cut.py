"""The cut of stage 3 on the similarity, found without masks."""

import numpy as np
import pytest

from core.config import Config
from core.cut import BINS, COLUMNS, MIN_GAIN, count_similarities, find_cuts, logit_map
from core.data.settings import DataConfig
from core.run import log
from make_debiased_labels import warn_of


def counts(*groups) -> np.ndarray:
    """(1, 3, BINS) of the similarities of region, ring and kept cells."""
    bins = [((np.asarray(g) + 1) * BINS / 2).astype(int) for g in groups]
    return np.stack([np.bincount(b, minlength=BINS) for b in bins])[None]


def cut_of(*groups) -> dict[str, float]:
    return {name: values[0] for name, values in find_cuts(counts(*groups)).items()}


def mixture(share: float, gap: float = 0.3, count: int = 20_000):
    """Object and context of a region, then the ring and the kept cells."""
    rng = np.random.default_rng(0)
    objects = rng.normal(gap, 0.1, round(share * count)).clip(-1, 0.999)
    context = rng.normal(0, 0.1, count - len(objects))
    return objects, context, rng.normal(0, 0.1, count), rng.normal(gap, 0.1, count).clip(-1, 0.999)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_share_of_objects_in_a_mixture_is_found(share):
    objects, context, ring, kept = mixture(share)
    found = cut_of(np.append(objects, context), ring, kept)
    assert found["object_share"] == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_cut_is_the_best_one_by_the_truth(share):
    """The groups are drawn from the model, so the expected IoU must be the IoU with the truth."""
    objects, context, ring, kept = mixture(share)
    found = cut_of(np.append(objects, context), ring, kept)

    def iou(cut: float) -> float:
        true = (objects > cut).sum()
        return true / (len(objects) + (context > cut).sum())

    best = max(iou(cut) for cut in np.linspace(-0.5, 0.8, 200))
    assert iou(found["cut"]) > best - 0.005
    assert found["expected_iou"] == pytest.approx(best, abs=0.02)
    assert found["remaining"] == pytest.approx(
        (np.append(objects, context) > found["cut"]).mean(), abs=1e-3
    )


def test_more_context_asks_for_a_higher_cut():
    cuts = []
    for share in (0.2, 0.5, 0.8):
        objects, context, ring, kept = mixture(share)
        cuts.append(cut_of(np.append(objects, context), ring, kept)["cut"])
    assert cuts[0] > cuts[1] > cuts[2]


def test_scale_and_offset_of_the_similarities_do_not_matter():
    objects, context, ring, kept = mixture(0.5)
    region = np.append(objects, context)
    plain = cut_of(region, ring, kept)
    changed = cut_of(*(0.4 * g + 0.3 for g in (region, ring, kept)))
    assert changed["cut"] == pytest.approx(0.4 * plain["cut"] + 0.3, abs=0.01)
    for name in ("object_share", "remaining", "contrast", "expected_iou"):
        assert changed[name] == pytest.approx(plain[name], abs=0.02)
    assert 0.4 * changed["slope"] == pytest.approx(plain["slope"], rel=0.02)


def test_slope_is_that_of_two_normal_distributions():
    objects, context, ring, kept = mixture(0.5)
    found = cut_of(np.append(objects, context), ring, kept)
    assert found["slope"] == pytest.approx(0.3 / 0.1**2, rel=0.05)


def test_class_that_resembles_its_surroundings_has_no_cut():
    objects, context, ring, kept = mixture(0.5, gap=0.05)
    found = cut_of(np.append(objects, context), ring, kept)
    assert np.isnan(found["cut"]) and 0.5 < found["contrast"] < 0.8 and found["remaining"] == 1
    assert 0 < found["expected_iou"] - found["object_share"] < MIN_GAIN
    found = cut_of(np.append(objects, context), kept, ring)  # kept cells less similar than others
    assert np.isnan(found["cut"]) and np.isnan(found["expected_iou"])


@pytest.mark.parametrize("missing", range(3))
def test_class_without_one_of_the_groups_has_no_cut(missing):
    groups = [[0.1], [0.0], [0.9]]
    groups[missing] = []
    groups = [np.array(g, float) for g in groups]
    assert np.isnan(cut_of(*groups)["cut"])


def test_region_of_pure_object_is_kept():
    _, _, ring, kept = mixture(0.5, gap=0.6)
    found = cut_of(kept, ring, kept)
    assert found["object_share"] == 1 and found["remaining"] == 1 and np.isnan(found["cut"])


def test_groups_of_cells_are_region_ring_and_kept():
    regions = np.zeros((7, 7), int)
    regions[3, 3], regions[0, 0], regions[6, 6] = 2, 1, -1
    kept = regions == 2
    maps = np.arange(49).reshape(1, 7, 7) / 100
    found = count_similarities(maps, regions, kept, [2])
    assert found.shape == (1, 3, BINS) and found.sum(2).tolist() == [[1, 24, 1]]
    assert found[0, 0].argmax() == found[0, 2].argmax() == int((maps[0, 3, 3] + 1) * BINS / 2)


def test_classes_without_a_cut_take_no_part_in_the_logit():
    cuts = {name: np.zeros(3) for name in COLUMNS}
    cuts["cut"], cuts["slope"] = np.array([0.5, np.nan, 0.1]), np.array([2.0, 0.0, 10.0])
    maps = np.array([[[0.7, 0.1]], [[0.9, 0.9]], [[0.1, 0.2]]])
    assert np.allclose(logit_map(maps, cuts, [1, 2, 3]), [[0.4, 1.0]])
    assert np.allclose(logit_map(maps[:2], cuts, [1, 2]), [[0.4, -0.8]])


def test_stage_warns_of_classes_that_lose_all_or_nothing_and_of_those_without_a_cut(
    monkeypatch, capsys
):
    monkeypatch.setattr(log, "printed", {})
    config = Config(
        data=DataConfig(classes=("boat", "train", "leather sofa", "cat", "absent", "cup"))
    )
    cuts = {
        "cut": np.array([0.5, 0.4, np.nan, 0.1, np.nan, np.nan]),
        "object_share": np.array([0.3, 0.5, 0.61, 0.7, np.nan, np.nan]),
        "expected_iou": np.array([0.6, 0.7, 0.64, 0.9, np.nan, np.nan]),
        "contrast": np.array([0.9, 0.95, 0.61, 0.9, np.nan, 0.45]),  # of the cup: worse than chance
    }
    auc = np.array([0.9, 0.8, 0.6, 0.9, np.nan, 0.5])
    found = warn_of(config, [0.97, 0.3, 0.0, 0.001, 0.0, 0.0], cuts, auc)
    nearly_all, alike, nothing = capsys.readouterr().err.splitlines()
    assert "nearly all labels: boat 97%. " in nearly_all
    assert "by less than 0.1: leather sofa 0.61 to 0.64, cup no gain. " in alike
    assert "less than 1% of the labels: cat 0.1%. " in nothing
    alike = {"leather sofa": "0.61 to 0.64", "cup": "no gain"}
    told = [{"boat": "97%"}, alike, {"cat": "0.1%"}]
    assert [w["classes"] for w in found] == told and all(w["remedy"] for w in found)
    assert warn_of(config, [0.2] * 6, {}, np.full(6, np.nan)) == []
    assert not capsys.readouterr().err


def test_stage_warns_of_features_that_do_not_suit_the_images(monkeypatch, capsys):
    """The median decides: animals resemble each other, so single low values are common."""
    monkeypatch.setattr(log, "printed", {})
    config = Config(data=DataConfig(classes=("boat", "train", "cat")))
    (found,) = warn_of(config, [0.3] * 3, {}, np.array([0.66, 0.9, 0.61]))
    assert found["classes"] == {"boat": "0.66", "cat": "0.61"}
    assert "boat 0.66, cat 0.61. These features do not suit" in capsys.readouterr().err
    assert warn_of(config, [0.3] * 3, {}, np.array([0.6, 0.9, np.nan])) == []
