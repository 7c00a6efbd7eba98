"""The dense CRF in torch: against the numba backend, and what only batches have."""

import numpy as np
import pytest
import torch
from test_dense import NARROW, alike, features_of, scene

from core.crf import batched
from core.crf.batched import BatchedLattice, grid_filter, refine
from core.crf.dense import CrfConfig, DenseCRF, make_crf
from core.crf.permutohedral import LatticeFilter
from core.crf.spatial import GridFilter
from core.run.errors import UserError


def batch(labels: int, count: int = 3):
    pairs = [scene(40, 52, labels, seed) for seed in range(count)]
    images, probs = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
    return images, probs, torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(probs)


def test_filters_are_those_of_the_numba_backend():
    images, probs, _, _ = batch(3)
    features = np.stack([features_of(image, 8, 20) for image in images])
    values = probs[:, 1:].reshape(3, 2, -1)
    lattice = BatchedLattice(torch.from_numpy(features).transpose(1, 2), 4)
    together = lattice(torch.from_numpy(values)).numpy()
    grid = grid_filter((40, 52), 1.5, 3, torch.device("cpu"))
    spatial = grid(torch.from_numpy(probs[:, 1:])).numpy().reshape(3, 2, -1)
    points = 0
    for k in range(3):
        ours = LatticeFilter(features[k], 4)
        points += BatchedLattice(torch.from_numpy(features[k].T)[None], 4).count
        for filtered, theirs in ((together[k], ours), (spatial[k], GridFilter(40, 52, 1.5, 3))):
            expected = np.zeros_like(values[k])
            theirs.add_to(expected, values[k])
            # Rounding carries some pixels on a border of two simplices into the other one.
            np.testing.assert_allclose(filtered, expected, atol=0.03)
            assert np.abs(filtered - expected).mean() < 1e-3
    assert lattice.count == points  # images share no lattice point


@pytest.mark.parametrize("settings", [{}, {"vertices": 3}, {"relaxation": 1.8, "iterations": 6}])
@pytest.mark.parametrize("labels", [2, 5])
def test_posterior_is_that_of_the_numba_backend(labels, settings):
    images, probs, pixels, maps = batch(labels)
    crf = DenseCRF("numba", **NARROW, **settings)
    ours = refine(pixels, maps, crf).numpy()
    for image, unary, refined in zip(images, probs, ours, strict=True):
        expected = crf(image, unary)
        assert alike(refined, expected) > 0.999 and np.abs(refined - expected).mean() < 1e-3
    np.testing.assert_allclose(ours.sum(1), 1, atol=1e-5)


def test_labels_that_take_no_part_cost_nothing_and_stay_at_zero():
    _, _, pixels, maps = batch(5)
    crf = DenseCRF("torch", **NARROW)
    present = torch.tensor([[1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 0, 0, 0]]).bool()
    refined = refine(pixels, maps, crf, present)
    for k in range(3):
        assert (refined[k, ~present[k]] == 0).all()
        alone = refine(pixels[k : k + 1], maps[k : k + 1, present[k]], crf)[0]
        torch.testing.assert_close(refined[k, present[k]], alone, atol=1e-4, rtol=0)


def test_memory_bounds_how_many_images_are_refined_together(monkeypatch):
    _, _, pixels, maps = batch(3)
    crf, seen = DenseCRF("torch", **NARROW), []
    whole = refine(pixels, maps, crf)
    monkeypatch.setattr(batched, "BYTES", 2 * 40 * 52 * batched.bytes_per_pixel(3))
    kept = batched._filters
    monkeypatch.setattr(batched, "_filters", lambda i, c: seen.append(len(i)) or kept(i, c))
    present = torch.ones(3, 3, dtype=torch.bool)
    for given in (None, present):
        torch.testing.assert_close(refine(pixels, maps, crf, given), whole, atol=1e-4, rtol=0)
    assert seen == [2, 1] * 2


def test_backend_torch_takes_the_arrays_of_the_others():
    image, probs = scene(30, 40, 3)
    transposed = np.asfortranarray(image)
    ours = DenseCRF("torch", **NARROW)(transposed, probs)
    assert ours.dtype == np.float32
    assert alike(ours, DenseCRF("numba", **NARROW)(image, probs)) > 0.999
    assert DenseCRF("auto", "cuda:1").backend == "torch"


def test_autocast_around_it_changes_nothing():
    """Stage 4 refines within a step whose networks run in bf16."""
    pixels, maps = batch(3)[2:]
    plain = refine(pixels, maps, DenseCRF("torch", **NARROW))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(refine(pixels, maps, DenseCRF("torch", **NARROW)), plain)


def test_threads_use_the_gpu_of_the_process(monkeypatch):
    """The current GPU belongs to a thread; in a new one, it is the first."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert make_crf(CrfConfig(), torch.device("cuda")).device == "cuda:3"


def test_features_beyond_the_keys_are_one_message():
    with pytest.raises(UserError, match="raise srgb_bilateral or sxy_bilateral"):
        refine(*batch(2)[2:], DenseCRF("torch", srgb_bilateral=1e-3))
