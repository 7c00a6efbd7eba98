"""Dense CRF: against an exact mean field, against pydensecrf, and its edges."""

import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from conftest import ROOT

from core.crf import permutohedral
from core.crf.dense import DenseCRF
from core.crf.permutohedral import LatticeFilter
from core.crf.spatial import GridFilter
from core.run.errors import UserError

# Kernels as wide as the little images below ask for.
NARROW = {"sxy_gaussian": 1.5, "sxy_bilateral": 8, "srgb_bilateral": 20}


def scene(height: int, width: int, labels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A blurred mosaic with grain, and probabilities that follow its regions roughly."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, labels, (4, 5), dtype=np.uint8)
    region = cv2.resize(cells, (width, height), interpolation=cv2.INTER_NEAREST)
    colours = rng.integers(0, 256, (labels, 3)).astype(np.float32)
    image = cv2.GaussianBlur(colours[region], (0, 0), 0.7) + rng.normal(0, 6, (height, width, 3))
    probs = rng.random((labels, height, width), dtype=np.float32)
    probs += np.arange(labels)[:, None, None] == np.roll(region, (2, 3), (0, 1))
    probs = cv2.blur(probs.transpose(1, 2, 0), (5, 5)).transpose(2, 0, 1) ** 2
    return np.clip(image, 0, 255).astype(np.uint8), (probs / probs.sum(0)).astype(np.float32)


def features_of(image: np.ndarray, sxy: float, srgb: float) -> np.ndarray:
    """(5, N) float32."""
    y, x = np.indices(image.shape[:2])
    columns = [x.ravel() / sxy, y.ravel() / sxy, *(image.reshape(-1, 3).T / srgb)]
    return np.stack(columns).astype(np.float32)


def normalised_kernel(features: np.ndarray) -> np.ndarray:
    """(d, N) -> (N, N): the exact D^-1/2 K D^-1/2."""
    gram = features.T.astype(np.float64) @ features
    square = np.diag(gram)
    kernel = np.exp(gram - square[:, None] / 2 - square / 2)
    norm = 1 / np.sqrt(kernel.sum(1))
    return norm[:, None] * kernel * norm


def mean_field(probs: np.ndarray, message, iterations: int = 10) -> np.ndarray:
    """Q <- softmax(-U + message(Q)) over all L labels; message: (L, N) -> (L, N)."""

    def softmax(logits):
        exponent = np.exp(logits - logits.max(0))
        return exponent / exponent.sum(0)

    unary = -np.log(np.clip(probs, 1e-5, 1)).reshape(len(probs), -1)
    posterior = softmax(-unary)
    for _ in range(iterations):
        posterior = softmax(message(posterior) - unary)
    return posterior.reshape(probs.shape)


def alike(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the pixels that get the same label."""
    return float((a.argmax(0) == b.argmax(0)).mean())


@pytest.mark.parametrize("labels", [2, 3])
def test_spatial_kernel_alone_equals_the_exact_mean_field(labels):
    image, probs = scene(24, 32, labels)
    kernel = 3 * normalised_kernel(features_of(image, 1.5, 1)[:2])
    exact = mean_field(probs, lambda posterior: posterior @ kernel)
    ours = DenseCRF("numba", **NARROW, weight_bilateral=0)(image, probs)
    # The kernel is cut off at 4 sigma, and that is all; measured: 2e-4.
    np.testing.assert_allclose(ours, exact, atol=2e-3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("labels", [2, 3])
def test_posterior_is_close_to_the_exact_mean_field(labels, seed):
    image, probs = scene(24, 32, labels, seed)
    kernel = 3 * normalised_kernel(features_of(image, 1.5, 1)[:2])
    kernel += 4 * normalised_kernel(features_of(image, 8, 20))
    exact = mean_field(probs, lambda posterior: posterior @ kernel)
    ours = DenseCRF("numba", **NARROW)(image, probs)
    # The lattice is an approximation. Measured here: 98.8 to 99.9 % of the labels (the unary alone:
    # 62 to 83 %), and a mean difference of at most 0.010.
    assert alike(ours, exact) > 0.98
    assert np.abs(ours - exact).mean() < 0.02


@pytest.mark.parametrize("labels", [2, 4])
def test_channels_relative_to_label_0_equal_one_channel_per_label(labels):
    image, probs = scene(40, 48, labels)
    filters = [
        GridFilter(40, 48, 1.5, 3),
        LatticeFilter(features_of(image, 8, 20), 4),
    ]

    def message(posterior):
        out = np.zeros_like(posterior)
        for gaussian in filters:
            gaussian.add_to(out, posterior.astype(np.float32))
        return out

    every_label = mean_field(probs, message)
    ours = DenseCRF("numba", **NARROW)(image, probs)
    np.testing.assert_allclose(ours, every_label, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 3, 7])
def test_channels_filtered_together_equal_each_alone(channels):
    image, probs = scene(30, 40, channels + 1)
    lattice = LatticeFilter(features_of(image, 8, 20), 4)
    values = probs[1:].reshape(channels, -1)
    together, alone = np.zeros_like(values), np.zeros_like(values)
    lattice.add_to(together, values)
    for k in range(channels):
        lattice.add_to(alone[k : k + 1], values[k : k + 1])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-7)


def test_kept_vertices_are_those_with_the_largest_weights():
    features = features_of(scene(30, 40, 2)[0], 8, 20)
    every, kept = LatticeFilter(features, 1), LatticeFilter(features, 1, vertices=3)
    # Apart from the pixel's factor, which is the same for all of its vertices.
    largest = -np.sort(-every.weights, axis=1)[:, :3]
    shares = [w / w.sum(1, keepdims=True) for w in (largest, kept.weights)]
    np.testing.assert_allclose(*shares, atol=1e-5)


@pytest.mark.parametrize("labels", [2, 5])
def test_fast_settings_come_close_to_ten_plain_iterations(labels):
    image, probs = scene(120, 160, labels)
    plain = DenseCRF("numba")(image, probs)
    relaxed = DenseCRF("numba", iterations=6, relaxation=1.8)(image, probs)
    fast = DenseCRF("numba", iterations=6, relaxation=1.8, vertices=3)(image, probs)
    assert alike(relaxed, plain) > 0.999  # measured: 99.97 %
    assert alike(fast, plain) > 0.995  # measured: 99.8 %; the unary alone: 92 to 95 %


def test_pydensecrf_refuses_what_it_does_not_have():
    pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not installed")
    for setting in ({"relaxation": 1.8}, {"vertices": 4}):
        with pytest.raises(UserError, match=f"no {next(iter(setting))}|no vertices"):
            DenseCRF("pydensecrf", **setting)


def test_permuted_labels_permute_the_posterior():
    image, probs = scene(40, 48, 4)
    crf, order = DenseCRF("numba", **NARROW), [2, 0, 3, 1]
    np.testing.assert_allclose(crf(image, probs[order].copy()), crf(image, probs)[order], atol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"iterations": 0}, {"weight_gaussian": 0, "weight_bilateral": 0}]
)
def test_without_iterations_or_weights_the_unary_remains(settings):
    image, probs = scene(20, 20, 3)
    probs[0, :5] = 0  # clipped to 1e-5
    clipped = np.clip(probs, 1e-5, 1)
    posterior = DenseCRF("numba", **settings)(image, probs)
    np.testing.assert_allclose(posterior, clipped / clipped.sum(0), rtol=1e-4)


def test_label_spreads_to_its_colour_and_stops_at_the_edge():
    image = np.full((60, 60, 3), 40, np.uint8)
    image[15:45, 15:45] = 200
    object_probs = np.full((60, 60), 0.4, np.float32)
    object_probs[20:40, 20:50] = 0.6  # misses a margin of the square and leaks out of it
    posterior = DenseCRF("numba")(image, np.stack([1 - object_probs, object_probs]))
    assert (posterior.argmax(0) == (image[..., 0] == 200)).all()


@pytest.mark.parametrize("labels", [2, 3])
def test_posterior_is_a_distribution(labels):
    posterior = DenseCRF("numba")(*scene(30, 50, labels))
    assert posterior.dtype == np.float32 and posterior.min() >= 0
    np.testing.assert_allclose(posterior.sum(0), 1, atol=1e-5)


@pytest.mark.parametrize("labels", [2, 3, 5, 21])
def test_agrees_with_pydensecrf(labels):
    pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not installed: no reference")
    image, probs = scene(120, 160, labels)
    ours, theirs = (DenseCRF(b)(image, probs) for b in ("numba", "pydensecrf"))
    assert alike(ours, theirs) > 0.99  # measured: 99.99 %; the unary alone: 92 to 95 %
    # Theirs approximates the spatial kernel on a lattice, too; without it rounding is left.
    bilateral = {"weight_gaussian": 0}
    ours, theirs = (DenseCRF(b, **bilateral)(image, probs) for b in ("numba", "pydensecrf"))
    assert np.abs(ours - theirs).max() < 1e-3  # measured: 2e-5


def test_backend_pydensecrf_takes_views_and_read_only_arrays():
    pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not installed")
    check_views(DenseCRF("pydensecrf", iterations=2))


def test_views_and_read_only_arrays_give_the_same():
    check_views(DenseCRF("numba", iterations=2))


def check_views(crf: DenseCRF) -> None:
    image, probs = scene(20, 30, 3)
    view = np.ascontiguousarray(probs.transpose(1, 2, 0)).transpose(2, 0, 1)
    bgr = np.ascontiguousarray(image[..., ::-1])
    bgr.flags.writeable = view.flags.writeable = False
    np.testing.assert_array_equal(crf(bgr[..., ::-1], view), crf(image, probs))


def test_threads_give_the_bytes_of_a_serial_run():
    scenes = [scene(60, 80, 2 + seed % 3, seed) for seed in range(8)]
    crf = DenseCRF("numba")
    serial = [crf(*s).tobytes() for s in scenes]
    with ThreadPoolExecutor(4) as pool:
        threaded = [q.tobytes() for q in pool.map(lambda s: crf(*s), scenes)]
    assert threaded == serial


def test_single_label_is_certain():
    image, probs = scene(8, 9, 2)
    assert (DenseCRF("numba")(image, probs[:1]) == 1).all()


def test_single_pixel_keeps_its_label():
    probs = np.array([0.3, 0.7], np.float32).reshape(2, 1, 1)
    assert DenseCRF("numba")(np.zeros((1, 1, 3), np.uint8), probs).argmax(0) == 1


def test_pure_noise_fits_into_the_hash_table():
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    crf = DenseCRF("numba", sxy_bilateral=1, srgb_bilateral=1, iterations=2)  # 6 points per pixel
    assert np.isfinite(crf(image, scene(30, 40, 2)[1])).all()


def changed(**changes) -> tuple[np.ndarray, np.ndarray]:
    arrays = dict(zip(("image", "probs"), scene(8, 9, 2), strict=True))
    arrays |= {name: change(arrays[name]) for name, change in changes.items()}
    return arrays["image"], arrays["probs"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (changed(image=lambda a: a / np.float32(255)), "image must be .* uint8 .* got .* float32"),
        (changed(image=lambda a: a[..., 0]), r"image must be a \(H, W, 3\)"),
        (changed(image=lambda a: a[..., :2]), "3 channels"),
        (changed(image=lambda a: a[:-1]), r"height and width \(7, 9\)"),
        (changed(image=lambda a: a.tolist()), "image must be .* got .*list"),
        (
            changed(probs=lambda a: a.astype(np.float64)),
            "probs must be .* float32 .* got .* float64",
        ),
        (changed(probs=lambda a: a[0]), r"probs must be a \(L, H, W\)"),
        (changed(probs=lambda a: a[:0]), "L >= 1"),
        (changed(probs=lambda a: a * np.float32(np.nan)), "nan"),
        (changed(probs=lambda a: a * 20 - 10), "softmax"),
    ],
)
def test_wrong_input_is_refused(arrays, message):
    with pytest.raises(ValueError, match=message):
        DenseCRF("numba")(*arrays)


@pytest.mark.parametrize(
    "settings",
    [
        *({"iterations": -1}, {"iterations": 2.5}, {"sxy_gaussian": 0}, {"sxy_bilateral": -1}),
        *({"srgb_bilateral": 0}, {"weight_gaussian": -1}, {"weight_bilateral": float("nan")}),
        *({"relaxation": 0}, {"relaxation": 2}, {"vertices": 0}, {"vertices": 7}),
        *({"vertices": 2.5}, {"backend": "cuda"}),
    ],
    ids=str,
)
def test_setting_out_of_range_is_refused_by_name(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        DenseCRF(**settings)


def test_kernel_too_narrow_for_the_lattice_is_refused():
    with pytest.raises(UserError, match="raise srgb_bilateral"):
        DenseCRF("numba", srgb_bilateral=0.01)(*scene(8, 9, 2))


@pytest.mark.parametrize(
    ("backend", "module"), [("numba", "numba"), ("pydensecrf", "pydensecrf.densecrf")]
)
def test_missing_backend_names_the_pip_command(monkeypatch, backend, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {backend}"):
        DenseCRF(backend)


def test_auto_prefers_numba_and_falls_back(monkeypatch):
    assert DenseCRF().backend == "numba"
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in ("pydensecrf", "pydensecrf.densecrf"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    assert DenseCRF().backend == "pydensecrf"


def test_light_workers_need_no_torch():
    code = "import sys, core.crf.dense, core.crf.permutohedral; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (60, 80)])
def test_neighbours_in_the_lattice_are_the_points_one_step_away(size, monkeypatch):
    found = []
    search = permutohedral._find_neighbours

    def kept(keys, table, links):
        search(keys, table, links)
        found.append((keys, links))

    monkeypatch.setattr(permutohedral, "_find_neighbours", kept)
    LatticeFilter(np.random.default_rng(0).normal(0, 3, (5, size[0] * size[1])).astype("f4"), 1)
    ((keys, links),) = found
    points = {int(key): number for number, key in enumerate(keys[:-1])}
    for axis in range(6):
        step = int(permutohedral._MOVES[axis])
        for side, sign in ((0, -1), (1, 1)):
            expected = [points.get(key + sign * step, len(points)) for key in points]
            assert links[axis, :-1, side].tolist() == expected
    assert (links[:, -1] == len(points)).all()
