import math

import numpy as np
import pytest
import torch
from conftest import CLASSES
from torch.nn import functional as F

from core.data.lists import read_split
from core.data.settings import DataConfig
from core.data.transforms import normalise
from core.run.errors import UserError
from core.uss.features import UssConfig
from core.uss.stego import (
    ClusterProbe,
    NeighbourPairs,
    SquareImages,
    correspondence,
    correspondence_loss,
    derangement,
    health,
    sample_points,
)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_correspondence_loss_equals_a_literal_transcription():
    """STEGO's loss, cell by cell: centred feature similarity, shift, clamped code similarity."""
    feat, code = (
        (rand(2, 5, 3, 3), rand(2, 5, 3, 3, seed=1)),
        (
            rand(2, 4, 3, 3, seed=2),
            rand(2, 4, 3, 3, seed=3),
        ),
    )
    shift = 0.2
    cells = [(y, x) for y in range(3) for x in range(3)]

    def cosine(pair, b, p, q):
        first, second = pair[0][b, :, p[0], p[1]], pair[1][b, :, q[0], q[1]]
        return F.cosine_similarity(first, second, dim=0).item()

    f = {(b, p, q): cosine(feat, b, p, q) for b in range(2) for p in cells for q in cells}
    old = sum(f.values()) / len(f)
    centred = {(b, p, q): v - sum(f[b, p, r] for r in cells) / 9 for (b, p, q), v in f.items()}
    new = sum(centred.values()) / len(centred)
    total = 0
    for (b, p, q), v in centred.items():
        c = cosine(code, b, p, q)
        total -= max(c, 0) * (v - new + old - shift)
    loss, similarity = correspondence_loss(feat, code, shift)
    assert similarity.shape == (2, 3, 3, 3, 3)
    assert math.isclose(loss.item(), total / len(f), abs_tol=1e-6)


def test_features_get_no_gradient_and_codes_do():
    feat, code = rand(1, 2, 2, 2).requires_grad_(), rand(1, 2, 2, 2, seed=1).requires_grad_()
    correspondence_loss((feat, feat), (code, code), 0.1)[0].backward()
    assert feat.grad is None and code.grad.abs().sum() > 0


def test_correspondence_of_a_map_with_itself_is_one_at_the_same_cell():
    maps = rand(1, 4, 2, 2)
    table = correspondence(maps, maps)
    assert torch.allclose(torch.einsum("bhwhw->bhw", table), torch.ones(1, 2, 2))


def test_sampling_at_the_corners_gives_the_corner_cells():
    maps = torch.arange(4.0).view(1, 1, 2, 2)
    corners = torch.tensor([[[[-1.0, -1.0], [1.0, -1.0]], [[-1.0, 1.0], [1.0, 1.0]]]])
    assert torch.equal(sample_points(maps, corners), maps)


def test_no_image_is_its_own_negative():
    for seed in range(20):
        order = derangement(5, torch.Generator().manual_seed(seed))
        assert sorted(order.tolist()) == list(range(5))
        assert (order != torch.arange(5)).all()


def test_health_tells_unrelated_pairs_and_neighbours_apart():
    figures = health(torch.tensor([-0.5, 0.0, 0.05, 0.4]), torch.tensor([0.0, 1.0]))
    assert math.isclose(figures["negatives_at_zero"], 0.75)
    assert math.isclose(figures["positives_spread"], 0.5**0.5, rel_tol=1e-6)


def test_probe_finds_the_codes_clusters_and_leaves_the_codes_alone():
    torch.manual_seed(0)
    code = F.one_hot(torch.arange(12).view(1, 3, 4) % 2, 2).permute(0, 3, 1, 2).float()
    code.requires_grad_()
    probe = ClusterProbe(2, 2)
    optimizer = torch.optim.Adam(probe.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        probe(code).backward()
        optimizer.step()
    assert probe(code) < -0.999 and code.grad is None


@pytest.fixture
def split(tiny_data):
    return read_split(DataConfig(root=str(tiny_data), classes=tuple(CLASSES)), "train")


def test_published_presets_fill_what_is_not_set():
    chosen = UssConfig(preset="cocostuff27_vits8", shift_inter=0.05)
    weights = (chosen.weight_negative, chosen.weight_inter, chosen.weight_intra)
    shifts = (chosen.shift_negative, chosen.shift_inter, chosen.shift_intra)
    assert weights == (0.63, 0.25, 0.67) and shifts == (0.66, 0.05, 0.08)
    assert UssConfig().shift_intra == 0.12
    with pytest.raises(UserError, match=r"set uss\.method to stego"):
        UssConfig(method="frozen", weights="stego.ckpt")


def test_five_crops_are_the_corners_and_the_middle(split):
    squares = SquareImages(split, 64, 5)
    image = torch.from_numpy(split.read_image(2)).permute(2, 0, 1)
    assert len(squares) == 5 * len(split)
    places = [(0, 0), (0, 64), (64, 0), (64, 64), (32, 32)]
    for crop, (y, x) in enumerate(places):
        expected = normalise(image[:, y : y + 64, x : x + 64])
        assert torch.equal(squares[10 + crop, 0]["image"], expected)


def test_centre_squares_are_resized_to_the_resolution(split):
    squares = SquareImages(split, 32, 1)
    assert len(squares) == len(split) and squares[3, 0]["image"].shape == (3, 32, 32)


def test_partners_are_the_neighbours_in_turn(split):
    squares = SquareImages(split, 32, 1)
    near = np.array([[k + 1, k + 2] for k in range(len(split))])
    pairs = NeighbourPairs(squares, near)
    for seed in (6, 7):
        assert torch.equal(pairs[3, seed]["image"], squares[3, 0]["image"])
        assert torch.equal(pairs[3, seed]["partner"], squares[4 + seed % 2, 0]["image"])


def test_settings_of_a_training_that_does_not_run_are_not_used():
    unused = UssConfig(method="stego", weights="stego.ckpt").unused()
    assert {"iterations", "lr", "shift_intra", "backbone.weights"} <= {*unused}
    assert not {"code_dim", "weights"} & {*unused}
