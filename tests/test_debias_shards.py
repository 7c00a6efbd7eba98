"""Centroid selection over shards: exact merging, the plain formula, ties, resuming, refusals."""

import math

import numpy as np
import pytest
import torch
from conftest import run_python

from core import debias_shards
from core.debias import background_distance, debiased_centroid, debiased_centroids
from core.debias_shards import (
    background_sum,
    kept_counts,
    select,
    thresholds,
    write_distances,
    write_shard,
)
from core.run.errors import UserError

ROWS = ("vectors", "labels", "images", "sizes", "distance", "selected")


def clusters(images=40, classes=5, width=7, seed=0, repeats=1) -> dict[str, np.ndarray]:
    """Rows of a made-up training set; the last class never occurs. Repeats make ties."""
    rng = np.random.default_rng(seed)
    labels, numbers = [], []
    for image in range(images):
        present = rng.choice(np.arange(1, classes), rng.integers(0, classes), replace=False)
        own = [0] * rng.integers(0, 3) + [c for c in sorted(present) for _ in range(2)]
        labels += own
        numbers += [image] * len(own)
    vectors = rng.normal(size=(-(-len(labels) // repeats), width)).repeat(repeats, 0)
    vectors = vectors[rng.permutation(len(vectors))][: len(labels)] + [2, *[0] * (width - 1)]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return {
        "vectors": vectors.astype(np.float32),
        "labels": np.array(labels, np.int16),
        "images": np.array(numbers, np.int32),
        "sizes": rng.integers(1, 99, len(labels)).astype(np.int32),
    }


def sharded(folder, rows, parts, rng=None):
    """The rows in `parts` shards; with `rng`, images are dealt out and the shards shuffled."""
    images = np.unique(rows["images"])
    groups = np.array_split(images if rng is None else rng.permutation(images), parts)
    shards = []
    for k, group in enumerate(groups):
        taken = np.concatenate([[], *(np.flatnonzero(rows["images"] == i) for i in group)])
        shards.append(folder / f"{k:05d}.npz")
        write_shard(shards[-1], **{n: v[taken.astype(int)] for n, v in rows.items()})
    return shards if rng is None else [shards[k] for k in rng.permutation(parts)]


def selected(shards, classes=5, alpha=0.4, nearest=None) -> dict[str, np.ndarray]:
    """The debiased centroids; and what they were chosen from and how, in the order of images."""
    centroids = select(shards, classes, alpha, nearest)
    background, found = background_sum(shards, classes)
    distances = write_distances(shards, background, found[0], nearest)
    floor = thresholds(shards, distances, kept_counts(found, alpha))
    parts = []
    ranked = debias_shards._ranked(shards, distances)
    for shard, file, (labels, keys) in zip(shards, distances, ranked, strict=True):
        part = {**np.load(shard), **np.load(file)}
        part["selected"] = (keys >= floor[labels]) & (labels > 0)
        parts.append({name: part[name] for name in ROWS})
    rows = {name: np.concatenate([part[name] for part in parts]) for name in ROWS}
    order = rows["images"].argsort(kind="stable")
    return {"centroids": centroids, **{name: values[order] for name, values in rows.items()}}


def equal(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> bool:
    """Whether two results are the same, bit for bit."""
    return one.keys() == two.keys() and all(one[k].tobytes() == two[k].tobytes() for k in one)


@pytest.mark.parametrize("nearest", [None, 1, 4])
@pytest.mark.parametrize("repeats", [1, 6])
def test_any_division_and_order_gives_the_same_bytes(tmp_path, nearest, repeats):
    rows, rng = clusters(width=33, repeats=repeats), np.random.default_rng(1)
    whole = selected(sharded(tmp_path / "one", rows, 1), nearest=nearest)
    for k, parts in enumerate((2, 3, 8, 15, 38)):
        shards = sharded(tmp_path / str(k), rows, parts, rng)
        assert equal(selected(shards, nearest=nearest), whole)


def one_hot(seed=0) -> dict[str, np.ndarray]:
    """A training set whose distances are exact and mostly ties, between directions as well."""
    rows, rng = clusters(images=60, seed=seed), np.random.default_rng(seed)
    rows["vectors"] = np.eye(7, dtype=np.float32)[rng.integers(0, 7, len(rows["labels"]))]
    return rows


@pytest.mark.parametrize("nearest", [None, 1, 3, 999])
@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.4, 0.77, 1])
@pytest.mark.parametrize("make", [clusters, one_hot])
def test_selection_from_shards_is_that_in_memory(tmp_path, make, alpha, nearest):
    for seed in range(3):
        rows = make(seed=seed)
        vectors, labels = torch.from_numpy(rows["vectors"]), torch.from_numpy(rows["labels"])
        centroids, distance, kept = debiased_centroids(vectors, labels, 5, alpha, nearest)
        found = selected(sharded(tmp_path / str(seed), rows, 4), alpha=alpha, nearest=nearest)
        assert np.array_equal(found["selected"], kept.numpy())
        assert kept.any() and (alpha == 1 or not kept[labels > 0].all())
        assert np.allclose(found["distance"], distance.numpy(), rtol=0, atol=1e-6)
        assert np.allclose(found["centroids"], centroids.numpy(), rtol=0, atol=1e-6)
        if make is one_hot:  # ties are there
            assert len(np.unique(found["distance"][rows["labels"] == 1])) <= 7


@pytest.mark.parametrize("nearest", [None, 1, 10, 999])
@pytest.mark.parametrize("alpha", [0.05, 0.4, 1])
def test_equals_the_plain_formula(tmp_path, alpha, nearest):
    rows = clusters(images=90, width=16)
    result = selected(sharded(tmp_path, rows, 4), alpha=alpha, nearest=nearest)
    vectors = torch.from_numpy(rows["vectors"]).double()
    background = vectors[rows["labels"] == 0]
    for name in ("vectors", "labels", "images", "sizes"):
        assert np.array_equal(result[name], rows[name])
    for c in range(1, 5):
        ours = rows["labels"] == c
        plain = background_distance(vectors[ours], background, nearest).numpy()
        assert np.allclose(result["distance"][ours], plain, rtol=0, atol=1e-6)
        count = math.ceil(alpha * ours.sum())
        farthest = np.flatnonzero(ours)[np.argsort(-plain)[:count]]
        assert np.array_equal(np.flatnonzero(ours & result["selected"]), np.sort(farthest))
        mean = debiased_centroid(vectors[ours], background, alpha, nearest).numpy()
        assert np.allclose(result["centroids"][c - 1], mean, rtol=0, atol=1e-6)
    assert not result["centroids"][4].any() and not result["distance"][rows["labels"] == 0].any()


def test_among_equals_the_first_image_is_kept(tmp_path):
    same = np.array([[0.6, 0.8]] * 6 + [[1, 0]], np.float32)
    labels, images = np.array([1, 1, 1, 1, 1, 1, 0]), np.array([4, 4, 2, 2, 3, 3, 0])
    write_shard(tmp_path / "a.npz", same, labels, images, np.ones(7))
    result = selected([tmp_path / "a.npz"], classes=1, alpha=0.5)
    assert result["images"].tolist() == [0, 2, 2, 3, 3, 4, 4]
    assert result["selected"].tolist() == [False, True, True, True, False, False, False]


def test_one_centroid_and_an_empty_shard(tmp_path):
    vectors = np.array([[0, 1], [1, 0]], np.float32)
    write_shard(tmp_path / "a.npz", vectors, np.array([0, 2]), np.array([0, 0]), np.ones(2))
    none = np.zeros(0, np.int64)
    write_shard(tmp_path / "b.npz", np.zeros((0, 2), np.float32), none, none, none)
    shards = [tmp_path / "b.npz", tmp_path / "a.npz"]
    for nearest in (None, 3):
        result = selected(shards, classes=2, alpha=0.01, nearest=nearest)
        assert result["distance"].tolist() == [0, 0.5]
        assert result["centroids"].tolist() == [[0, 0], [1, 0]]


def test_distances_are_reused_and_belong_to_their_backgrounds(tmp_path):
    rows = clusters()
    shards = sharded(tmp_path, rows, 3)
    background, found = background_sum(shards, 5)
    first = write_distances(shards[:1], background, found[0])  # killed after one
    before = first[0].stat().st_mtime_ns
    ours = selected(shards)
    assert first[0].stat().st_mtime_ns == before
    assert equal(ours, selected(sharded(tmp_path / "whole", rows, 1)))
    others = [write_distances(shards, background, found[0], k) for k in (1, 2)]
    others.append(write_distances(shards, background + 1, found[0]))
    assert len({*first, *(files[0] for files in others)}) == 4


def test_distances_of_some_shards_look_at_the_backgrounds_of_all(tmp_path):
    """As processes do that share the shards among them."""
    one, two = (sharded(tmp_path / n, clusters(), 4) for n in "ab")
    background, found = background_sum(one, 5)
    whole = write_distances(one, background, found[0], 3)
    for rank in (0, 1):
        write_distances(two[rank::2], background, found[0], 3, among=two)
    for ours, theirs in zip(write_distances(two, background, found[0], 3), whole, strict=True):
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, 2])
def test_vectors_that_are_not_of_unit_length_are_refused(tmp_path, value):
    vectors = np.array([[1, 0], [value, 0]], np.float32)
    with pytest.raises(UserError, match="unit length"):
        write_shard(tmp_path / "a.npz", vectors, np.array([0, 1]), np.array([0, 1]), np.ones(2))


@pytest.mark.parametrize("images", [np.zeros(513, np.int64), np.full(513, 2**25)])
def test_more_than_keys_tell_apart_is_refused(tmp_path, images):
    vectors = np.ones((513, 1), np.float32)
    with pytest.raises(UserError, match="more than"):
        write_shard(tmp_path / "a.npz", vectors, np.ones(513), images, np.ones(513))


def test_simulation_of_scale_prints_its_table_and_leaves_nothing(tmp_path):
    sizes = ("--images", 9000, "--classes", 50, "--factor", "1/9", "--sizes", 1, 2, "--shard", 500)
    done = run_python("tools/bench/simulate_scale.py", *sizes, "--width", 8, "--folder", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| 2,000 | 4 |" in done.stdout and "| ~9,000 | 18 |" in done.stdout
    assert done.stdout.endswith("the same bytes\n") and not [*tmp_path.iterdir()]
