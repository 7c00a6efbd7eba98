"""The audit on clusters made by hand, and on the output of stage 3 with perfect features."""

import csv

import numpy as np
import pytest
import torch
from conftest import CLASSES, ROOT, run_inside, run_python
from invented_run import perfect_features
from torch.nn import functional as F

from core.config import Config
from core.data.labels import read_label, write_label
from core.data.lists import Split
from core.data.settings import DataConfig
from tools.audit.audit_bias import area_under_curve
from tools.audit.clusters import Clusters
from tools.audit.ranking import Audit, distinct, rank
from tools.common.pages import templates

GRASS, RAILS, SKY, TRAIN, CAT = range(5)


def world(rails_elsewhere: int) -> tuple[Config, Split, Clusters]:
    """60 images of a train, mostly on rails, and 60 of a cat; what each removes is its ground."""
    generator = torch.Generator().manual_seed(0)
    vectors, labels, images, removed = [], [], [], []
    for image in range(120):
        c = 1 + image // 60
        if c == 1:
            ground = RAILS if image % 10 else GRASS
        else:
            ground = RAILS if image - 60 < rails_elsewhere else GRASS
        rows = (
            (0, ground),
            (0, SKY),
            (c, ground if c == 1 else SKY),
            (c, TRAIN if c == 1 else CAT),
        )
        for number, (label, content) in enumerate(rows):
            noise = 0.1 * torch.randn(16, generator=generator)
            vectors.append(F.one_hot(torch.tensor(content), 16) + noise)
            labels.append(label)
            images.append(image)
            removed.append(50 if number == 2 else 0)
    tags = np.repeat(np.eye(2, dtype=bool), 60, 0)
    split = Split(tuple(map(str, range(120))), (), tags)
    count = len(labels)
    clusters = Clusters(
        F.normalize(torch.stack(vectors), dim=1),
        np.array(labels),
        np.array(images),
        np.full(count, 60),
        np.array(removed),
        np.full(120, 400),
        np.array([0, 100, 100]),
        np.array([0, 40, 40]),
        [],
    )
    data = DataConfig(classes=("train", "cat"), biased_classes=("train",))
    return Config(data=data), split, clusters


def test_context_that_keeps_a_class_company_is_bias_and_common_context_is_not():
    audits = rank(*world(rails_elsewhere=12), examples=2, witnesses=2)
    train, cat = audits
    assert (train.name, train.removed, cat.removed) == ("train", 0.4, 0.4)
    assert train.odds > 2 and train.score > 0.3
    assert cat.odds == pytest.approx(1, abs=0.5) and cat.score < 0.15
    assert area_under_curve(audits) == 1


def test_witnesses_show_what_was_removed_and_lack_the_class():
    config, split, clusters = world(rails_elsewhere=12)
    train = rank(config, split, clusters, examples=3, witnesses=2)[0]
    assert len(train.examples) == 3
    for example in train.examples:
        assert clusters.labels[example.part] == 1 and len(example.witnesses) == 2
        for row in example.witnesses:
            assert clusters.labels[row] == 0
            assert not split.tags[clusters.images[row], 0]
            assert clusters.vectors[row].argmax() == clusters.vectors[example.part].argmax()


def test_context_that_never_occurs_without_the_class_is_warned_of():
    train = rank(*world(rails_elsewhere=0), examples=1, witnesses=1)[0]
    assert train.name == "train" and train.unseen > 0.8 and "unseen" in train.warning
    audits = rank(*world(rails_elsewhere=50), examples=1, witnesses=1)
    assert not any(audit.warning for audit in audits)


def test_class_of_every_image_has_nothing_to_be_compared_with():
    config, split, clusters = world(rails_elsewhere=12)
    split.tags[:, 1] = True
    cat = next(a for a in rank(config, split, clusters, 1, 1) if a.name == "cat")
    assert cat.score == 0 and "no image without it" in cat.warning


def test_class_of_which_nothing_was_removed_has_no_score():
    config, split, clusters = world(rails_elsewhere=12)
    clusters.removed[:], clusters.marked[:] = 0, 0
    assert [a.score for a in rank(config, split, clusters, 1, 1)] == [0, 0]


def test_one_witness_of_each_image_nearest_first():
    assert distinct(np.array([3, 1, 2, 0]), np.array([7, 5, 7, 5]), 2) == [3, 2]


def test_names_are_escaped():
    audit = Audit("<b>&", 1, warning="<i>")
    template = templates(ROOT / "tools/audit").get_template("audit_bias.html.j2")
    html = template.render(
        config=Config(), audits=[audit], images=1, scores={}, checked=False, inline=None, blind=1
    )
    assert "&lt;b&gt;&amp;" in html and "<b>" not in html and "<i>" not in html


@pytest.fixture
def debiased(experiment, tiny_data):
    """Stage 3's output on features that say what each cell shows; labels claim the lower half."""

    def lower_half(mask: np.ndarray, main: int) -> np.ndarray:
        label = np.zeros(mask.shape, np.uint8)
        label[40:] = main
        return label

    perfect_features(experiment, tiny_data, lower_half)
    done = run_inside("make_debiased_labels.py", "--config", experiment)
    assert done.returncode == 0, done.stderr
    return experiment


def test_page_table_and_picture_without_masks_and_with_them(debiased, tiny_data, tmp_path):
    command = ("tools/audit/audit_bias.py", "--config", debiased, "--output", tmp_path / "out")
    hidden = (tiny_data / "SegmentationClass").rename(tiny_data / "away")
    try:
        done = run_python(*command)
    finally:
        hidden.rename(tiny_data / "SegmentationClass")
    assert done.returncode == 0, done.stderr
    rows = [*csv.DictReader((tmp_path / "out/audit.csv").open())]
    assert {row["name"] for row in rows} == {*CLASSES}
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True) and not rows[0]["precision"]
    page = (tmp_path / "out/audit.html").read_text()
    assert "http" not in page and "<script" not in page and "data:image/jpeg" in page
    assert "No mask was read" in page
    assert (tmp_path / "out/audit.png").read_bytes().startswith(b"\x89PNG")
    done = run_inside(*command, "--with-masks")
    assert done.returncode == 0, done.stderr
    rows = [*csv.DictReader((tmp_path / "out/audit.csv").open())]
    assert any(row["precision"] for row in rows)
    assert "recall</th>" in (tmp_path / "out/audit.html").read_text()


def test_missing_or_foreign_output_of_stage_3_is_one_message(debiased, tmp_path):
    folder = debiased.parent / "run/debias"
    label = next((debiased.parent / "labels").glob("*.png"))
    original = read_label(label)
    write_label(label, np.full_like(original, 3))
    done = run_inside("tools/audit/audit_bias.py", "--config", debiased)
    assert done.returncode and "is stale" in done.stderr and "Traceback" not in done.stderr
    write_label(label, original)
    (folder / "centroids.npz").write_bytes(b"broken")
    done = run_inside("tools/audit/audit_bias.py", "--config", debiased)
    assert done.returncode and "centroids.npz cannot be read" in done.stderr
    (folder / "centroids.npz").unlink()
    done = run_inside("tools/audit/audit_bias.py", "--config", debiased)
    assert done.returncode and "run make_debiased_labels.py" in done.stderr
