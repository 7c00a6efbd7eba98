"""Centroid selection over shards: exact merging, the plain formula, ties, resuming, refusals."""

import math
import sys

import numpy as np
import pytest
import torch
from conftest import run_python

import make_debiased_labels
from core.debias import debiased_centroids
from core.debias_shards import (
    _ranked,
    background_sum,
    kept_counts,
    select,
    thresholds,
    write_distances,
    write_shard,
)
from core.run.errors import UserError


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


@pytest.mark.parametrize("nearest", [None, 1, 4])
@pytest.mark.parametrize("repeats", [1, 6])
def test_any_division_and_order_gives_the_same_bytes(tmp_path, nearest, repeats):
    rows, rng = clusters(width=33, repeats=repeats), np.random.default_rng(1)
    whole = select(sharded(tmp_path / "one", rows, 1), 5, 0.4, nearest)
    for k, parts in enumerate((2, 3, 8, 15, 38)):
        shards = sharded(tmp_path / str(k), rows, parts, rng)
        assert select(shards, 5, 0.4, nearest).tobytes() == whole.tobytes()


@pytest.mark.parametrize("nearest", [None, 1, 10, 999])
@pytest.mark.parametrize("alpha", [0.05, 0.4, 1])
@pytest.mark.parametrize("repeats", [1, 6])
def test_streaming_equals_the_equations_in_memory(tmp_path, alpha, nearest, repeats):
    rows = clusters(images=90, width=16, repeats=repeats)
    shards = sharded(tmp_path, rows, 4)
    vectors, labels = torch.from_numpy(rows["vectors"]).double(), torch.from_numpy(rows["labels"])
    wanted, distance, kept = debiased_centroids(vectors, labels, 5, alpha, nearest)
    found = select(shards, 5, alpha, nearest)
    if repeats == 1:  # equal distances are kept in another order
        assert np.allclose(found, wanted, rtol=0, atol=1e-6)
    assert not found[4].any() and not distance[labels == 0].any()
    background, count = background_sum(shards, 5)
    files = write_distances(shards, background, count[0], nearest)
    streamed = np.concatenate([np.load(file)["distance"] for file in files])
    assert np.allclose(streamed, distance, rtol=0, atol=1e-6)
    for c in range(1, 5):
        assert kept[labels == c].sum() == math.ceil(round(alpha * (labels == c).sum().item(), 6))
        of_class = (labels == c).numpy()
        far, near = (distance.numpy()[of_class & side] for side in (kept.numpy(), ~kept.numpy()))
        assert far.min() >= near.max(initial=0) - 1e-12  # rounding


def test_among_equals_the_first_image_is_kept(tmp_path):
    same = np.array([[0.6, 0.8]] * 4 + [[0.8, 0.6]] * 2 + [[1, 0], [1, 0]], np.float32)
    labels, images = np.array([1, 1, 1, 1, 1, 1, 0, 0]), np.array([4, 4, 2, 2, 3, 3, 0, 0])
    write_shard(tmp_path / "a.npz", same, labels, images, np.ones(8))
    background, found = background_sum([tmp_path / "a.npz"], 1)
    distances = write_distances([tmp_path / "a.npz"], background, found[0])
    kept = kept_counts(found, 0.5)
    floor = thresholds([tmp_path / "a.npz"], distances, kept)
    ((_, keys),) = _ranked([tmp_path / "a.npz"], distances)
    assert (keys >= floor[labels]).tolist()[:6] == [True, False, True, True, False, False]


def test_one_centroid_and_an_empty_shard(tmp_path):
    vectors = np.array([[0, 1], [1, 0]], np.float32)
    write_shard(tmp_path / "a.npz", vectors, np.array([0, 2]), np.array([0, 0]), np.ones(2))
    none = np.zeros(0, np.int64)
    write_shard(tmp_path / "b.npz", np.zeros((0, 2), np.float32), none, none, none)
    shards = [tmp_path / "b.npz", tmp_path / "a.npz"]
    for nearest in (None, 3):
        assert select(shards, 2, 0.01, nearest).tolist() == [[0, 0], [1, 0]]


def test_distances_are_reused_and_belong_to_their_backgrounds(tmp_path):
    rows = clusters()
    shards = sharded(tmp_path, rows, 3)
    background, found = background_sum(shards, 5)
    first = write_distances(shards[:1], background, found[0])  # killed after one
    before = first[0].stat().st_mtime_ns
    ours = select(shards, 5, 0.4)
    assert first[0].stat().st_mtime_ns == before
    assert ours.tobytes() == select(sharded(tmp_path / "whole", rows, 1), 5, 0.4).tobytes()
    others = [write_distances(shards, background, found[0], k) for k in (1, 2)]
    others.append(write_distances(shards, background + 1, found[0]))
    assert len({*first, *(files[0] for files in others)}) == 4


def test_script_gives_the_same_labels_above_the_size(experiment, tmp_path, monkeypatch):
    for script in ("train_uss.py", "train_wsss.py"):
        done = run_python(script, "--config", experiment)
        assert done.returncode == 0, done.stderr
    found = []
    for size in (2**30, 0):
        monkeypatch.setattr(make_debiased_labels, "IN_MEMORY", size)
        folder = tmp_path / f"debias{size}"
        arguments = ["x", f"--config={experiment}", f"--debias.output_dir={folder}"]
        monkeypatch.setattr(sys, "argv", arguments)
        make_debiased_labels.main()
        labels = {p.name: p.read_bytes() for p in (folder / "labels").glob("*.png")}
        with np.load(folder / "centroids.npz") as file:
            found.append((labels, file["centroids"], {*file.files}))
    assert len(found[0][0]) == 16 and found[0][0] == found[1][0]
    assert np.allclose(found[0][1], found[1][1], rtol=0, atol=1e-6)
    assert found[1][2] == {"centroids", "made_from"} < found[0][2]


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
