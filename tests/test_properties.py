"""What holds for any input of the pure functions; hypothesis looks for a counterexample."""

import math
import tempfile
from pathlib import Path
from unicodedata import normalize

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch.nn import functional as F

from core import complement, debias
from core.crf.dense import DenseCRF
from core.data.labels import (
    BACKGROUND,
    BIASED,
    IGNORE,
    read_label,
    to_disk,
    to_training,
    write_label,
)
from core.data.loader import StepSampler
from core.data.tags import read_table
from core.metrics import confusion_matrix, scores
from tools.common.tables import write_table

settings.register_profile(
    "project", deadline=None, derandomize=True, max_examples=60, database=None
)
settings.load_profile("project")

CLASSES = 3
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))
LABELS = SHAPES.flatmap(
    lambda shape: arrays.arrays(np.uint8, shape, elements=st.sampled_from([0, 1, 2, 3, 255]))
)
SEEDS = st.integers(0, 2**31)


def floats(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def twins(seed: int, shape: tuple[int, int], values: list[int]) -> np.ndarray:
    return np.random.default_rng(seed).choice(values, shape).astype(np.uint8)


@given(LABELS, SEEDS)
def test_biased_pixels_come_from_classes_alone(label, seed):
    mask = torch.from_numpy(twins(seed, label.shape, [0, 1])).bool()
    before = torch.from_numpy(label).long()
    after = debias.mark_biased(torch.from_numpy(label), mask)
    changed = before != after
    assert (after[changed] == BIASED).all()
    assert torch.equal(changed, ~mask & (before != BACKGROUND) & (before != IGNORE))
    assert torch.equal(torch.from_numpy(to_training(to_disk(after.numpy()))), after)


@given(LABELS, SEEDS)
def test_teacher_fills_biased_pixels_and_no_others(label, seed):
    debiased = to_training(np.where(label == 3, 254, label).astype(np.uint8))
    debiased = torch.from_numpy(debiased)[None]
    teacher = torch.from_numpy(twins(seed, label.shape, [0, 1, 2])).long()[None]
    filled = complement.complement(debiased, teacher)
    biased = debiased == BIASED
    assert torch.equal(filled[biased], teacher[biased])
    assert torch.equal(filled[~biased], debiased[~biased])
    probs = floats(1, 1 + CLASSES, *label.shape, seed=seed).softmax(1)
    tags = torch.tensor([[1.0, 0.0, 1.0]])
    certainty = complement.certainty(debiased, probs, tags)
    assert (certainty[~biased] == 1).all() and (certainty >= 0).all() and (certainty <= 1).all()
    best = torch.maximum(probs[:, 1], probs[:, 3])
    assert torch.equal(certainty[biased], best[biased])


@given(LABELS, SEEDS, st.booleans())
def test_loss_of_a_batch_is_the_sum_of_its_parts(label, seed, balanced):
    labels = torch.from_numpy(to_training(label))[None].expand(3, -1, -1).clone()
    labels[1:] = labels[1:].roll(1, 2)
    logits = floats(3, 1 + CLASSES, *label.shape, seed=seed)
    certainty = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed))
    whole = complement.weighted_cross_entropy(logits, labels, certainty, balanced)
    counts = complement.labelled_pixels(labels)
    parts = [
        complement.weighted_cross_entropy(
            logits[k : k + 1], labels[k : k + 1], certainty[k : k + 1], balanced, counts
        )
        for k in range(3)
    ]
    assert torch.allclose(sum(parts), whole, atol=1e-5)
    plain = complement.weighted_cross_entropy(logits, labels)
    if (labels != IGNORE).any():
        assert torch.allclose(
            plain, F.cross_entropy(logits, labels, ignore_index=IGNORE), atol=1e-5
        )
    else:
        assert plain == 0


@given(SEEDS, st.integers(1, 30), st.integers(1, 6), st.integers(1, 5), st.booleans())
def test_kmeans_assigns_every_point_to_its_nearest_centroid(seed, count, width, k, repeated):
    points = F.normalize(floats(count, width, seed=seed), dim=1)
    if repeated:
        points = points[:1].expand(count, -1)
    centroids, assignment = debias.kmeans(points, k, torch.Generator().manual_seed(seed))
    assert 1 <= len(centroids) <= min(k, count)
    assert {*assignment.tolist()} == {*range(len(centroids))}  # none is empty
    near = (points @ centroids.T).max(1).values
    assert torch.allclose(near, (points * centroids[assignment]).sum(1), atol=1e-4)


@given(SEEDS, st.integers(1, 40), st.integers(1, 20), st.floats(0.01, 1))
def test_selected_centroids_are_the_farthest(seed, foreground, background, alpha):
    fg, bg = floats(foreground, 5, seed=seed), floats(background, 5, seed=seed + 1)
    for nearest in (None, 1, 7):
        distance = debias.background_distance(fg, bg, nearest)
        assert (distance >= -1e-6).all() and (distance <= 1 + 1e-6).all()
        chosen = debias.select_farthest(distance, alpha)
        assert len(chosen) == max(1, math.ceil(round(alpha * foreground, 6)))
        others = torch.ones(foreground, dtype=torch.bool)
        others[chosen] = False
        assert not others.any() or distance[chosen].min() >= distance[others].max()
    scaled = debias.debiased_centroid(fg * 7.0, bg * 0.1, alpha)[0]
    assert torch.allclose(scaled, debias.debiased_centroid(fg, bg, alpha)[0], atol=1e-5)


@given(LABELS, SEEDS)
def test_confusion_matrix_counts_every_pixel_once(truth, seed):
    predicted = twins(seed, truth.shape, [0, 1, 2, 3, 254, 255])
    matrix = confusion_matrix(predicted, truth, CLASSES)
    assert matrix.sum() == (truth != IGNORE).sum()
    halves = [confusion_matrix(p, t, CLASSES) for p, t in zip(predicted, truth, strict=True)]
    assert np.array_equal(sum(halves), matrix)
    perfect = scores(confusion_matrix(np.where(truth == 255, 0, truth), truth, CLASSES))
    assert np.nan_to_num(perfect.iou, nan=1.0).min() == 1
    s = scores(matrix)
    assert np.allclose((s.iou + s.fp + s.fn)[np.isfinite(s.iou)], 1)


@given(LABELS)
def test_label_maps_survive_the_disk(label):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "label.png"
        write_label(path, label)
        assert np.array_equal(read_label(path, CLASSES, label.shape), label)


WORDS = st.text(
    st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters=',;|"/'),
    min_size=1,
    max_size=8,
)


@given(st.dictionaries(WORDS, st.lists(st.sampled_from(["boat", "car"]), unique=True), min_size=1))
def test_tables_of_tags_survive_the_disk(table):
    table = {normalize("NFC", f"{name}.jpg"): tags for name, tags in table.items()}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "tags.csv"
        write_table(path, table)
        assert read_table(path, ("boat", "car")) == table


@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 30), SEEDS)
def test_every_epoch_shows_every_image_once(count, batch_size, iterations, seed):
    draws = [d for batch in StepSampler(count, batch_size, iterations, seed) for d in batch]
    assert len(draws) == batch_size * iterations
    for first in range(0, len(draws) - count + 1, count):
        assert sorted(index for index, _ in draws[first : first + count]) == [*range(count)]
    later = [*StepSampler(count, batch_size, iterations, seed, start=iterations // 2)]
    assert later == [*StepSampler(count, batch_size, iterations, seed)][iterations // 2 :]


@given(SEEDS, SHAPES, st.integers(2, 4))
@settings(max_examples=20)
def test_refined_probabilities_are_probabilities(seed, shape, labels):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
    probs = rng.dirichlet(np.ones(labels), shape).astype(np.float32).transpose(2, 0, 1)
    refined = DenseCRF("numba", iterations=3)(image, np.ascontiguousarray(probs))
    assert refined.shape == probs.shape and (refined >= 0).all()
    assert np.allclose(refined.sum(0), 1, atol=1e-4)
