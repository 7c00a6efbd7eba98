"""The equations of MARS: exact hand-made cases, naive transcriptions, and edges."""

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from core.complement import certainty, complement, weighted_cross_entropy
from core.debias import (
    background_distance,
    cell_labels,
    debiased_centroid,
    debiased_score,
    image_centroids,
    kmeans,
    mark_biased,
    select_farthest,
    tag_auc,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


# Eq. 1


def test_distance_to_opposite_same_and_orthogonal_background():
    fg = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    bg = torch.tensor([[2.0, 0.0]])
    assert torch.allclose(background_distance(fg, bg), torch.tensor([0.0, 1.0, 0.5]))


def test_distance_equals_the_naive_double_loop():
    fg, bg = rand(7, 5, seed=1), rand(11, 5, seed=2)
    for k, v in enumerate(fg):
        terms = [(1 - F.cosine_similarity(v, b, dim=0)) / 2 for b in bg]
        assert math.isclose(background_distance(fg, bg)[k], sum(terms) / len(terms), abs_tol=1e-6)
        assert math.isclose(background_distance(fg, bg, nearest=1)[k], min(terms), abs_tol=1e-6)
        three = sum(sorted(terms)[:3]) / 3
        assert math.isclose(background_distance(fg, bg, nearest=3)[k], three, abs_tol=1e-6)


# Check of the features


def test_tag_auc_is_the_area_under_the_roc_curve():
    vectors, centroids = rand(90, 6), rand(3, 6, seed=1)
    images = torch.arange(90) // 3
    tags = rand(30, 3, seed=2) > 0
    score = F.cosine_similarity(vectors[:, None], centroids[None], dim=2).view(30, 3, 3).amax(1)
    expected = [roc_auc_score(tags[:, c], score[:, c]) for c in range(3)]
    assert tag_auc(vectors, images, centroids, tags).tolist() == pytest.approx(expected)
    alike = tag_auc(vectors[:1].expand(90, -1), images, centroids, tags)
    assert alike.tolist() == [0.5] * 3


def test_tag_auc_is_unknown_where_there_is_nothing_to_compare():
    vectors, images = rand(8, 4), torch.arange(8)
    tags = torch.zeros(8, 3, dtype=torch.bool)
    tags[:, 1], tags[:4, 2] = True, True
    centroids = torch.cat([rand(2, 4), torch.zeros(1, 4)])
    assert tag_auc(vectors, images, centroids, tags).isnan().all()


# Cells


def test_small_classes_do_not_take_the_last_cell_of_another():
    label = torch.zeros(16, 16, dtype=torch.int64)
    label[:8, :8] = 1
    label[:3, :3] = 2  # fewer pixels than class 1, whose only cell this is
    label[8, 8], label[8, 9] = 3, 4  # both in one cell
    label[3, 12] = 2
    cells = cell_labels(label, (2, 2))
    assert cells[0].tolist() == [1, 2] and cells[1, 1] == 3


# Eq. 2 and 3


@pytest.mark.parametrize(
    ("count", "alpha", "kept"),
    [
        (5, 0.4, 2),
        (1, 0.4, 1),
        (10, 0.4, 4),
        (6, 0.4, 3),
        (3, 1.0, 3),
        (100, 0.07, 7),
        (2, 0.01, 1),
    ],
)
def test_kept_share_is_rounded_up_without_floating_point_slips(count, alpha, kept):
    assert len(select_farthest(torch.arange(count).float(), alpha)) == kept


def test_farthest_come_first_and_ties_keep_their_order():
    distance = torch.tensor([0.2, 0.9, 0.9, 0.1, 0.5])
    assert select_farthest(distance, 0.6).tolist() == [1, 2, 4]


def test_centroid_close_to_background_is_dropped():
    target, biased = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.1])
    fg, bg = torch.stack([biased, target, biased]), torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    assert torch.allclose(debiased_centroid(fg, bg, alpha=0.3)[0], target)


def test_centroid_equals_a_naive_transcription():
    fg, bg = rand(9, 4, seed=3), rand(6, 4, seed=4)
    unit = [v / v.norm() for v in fg]
    mean_distance = [sum((1 - v @ (b / b.norm())) / 2 for b in bg).item() / len(bg) for v in unit]
    order = sorted(range(len(fg)), key=lambda k: -mean_distance[k])[:4]  # ceil(.4 * 9)
    expected = sum(unit[k] for k in order) / 4
    assert torch.allclose(debiased_centroid(fg, bg, 0.4)[0], expected, atol=1e-6)


@pytest.mark.parametrize("alpha", [0, -0.1, 1.01])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        debiased_centroid(rand(2, 3), rand(2, 3), alpha)


@pytest.mark.parametrize(("fg", "bg"), [((0, 3), (2, 3)), ((2, 3), (0, 3)), ((2, 3), (2, 4))])
def test_empty_or_unequal_centroids_are_refused(fg, bg):
    with pytest.raises(ValueError, match="non-empty"):
        debiased_centroid(torch.zeros(fg), torch.zeros(bg))


# Eq. 5


def test_only_labelled_pixels_outside_the_mask_become_biased():
    label = torch.tensor([[0, 1, 2, 255], [0, 1, 2, 255]], dtype=torch.uint8)
    mask = torch.tensor([[True] * 4, [False] * 4])
    assert mark_biased(label, mask).tolist() == [[0, 1, 2, 255], [0, -1, -1, 255]]


def test_image_without_foreground_keeps_its_label():
    label = torch.zeros(3, 3, dtype=torch.uint8)
    assert torch.equal(mark_biased(label, torch.zeros(3, 3, dtype=bool)), label.long())


# Fig. 6, Eq. 6 and 7


def test_teacher_fills_biased_pixels_alone():
    label, teacher = torch.tensor([[-1, 0, 1, 255]]), torch.tensor([[2, 2, 2, 2]])
    assert complement(label, teacher).tolist() == [[2, 0, 1, 255]]


def test_certainty_is_the_best_tagged_class_where_biased_and_one_elsewhere():
    label = torch.tensor([[[-1, -1, 1]]])
    probs = torch.tensor([[[[0.9, 0.1, 0.5]], [[0.06, 0.3, 0.2]], [[0.04, 0.6, 0.3]]]])
    only_first = certainty(label, probs, torch.tensor([[1.0, 0.0]]))
    assert torch.allclose(only_first, torch.tensor([[[0.06, 0.3, 1.0]]]))
    both = certainty(label, probs, torch.tensor([[1.0, 1.0]]))
    assert torch.allclose(both, torch.tensor([[[0.06, 0.6, 1.0]]]))


def test_biased_pixel_that_the_teacher_calls_background_weighs_nothing():
    probs = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    weight = certainty(torch.tensor([[[-1]]]), probs, torch.ones(1, 1))
    assert weight.item() == 0


def test_loss_of_hand_made_probabilities():
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])  # two pixels
    logits = probs.log().T[None, :, None]  # (1, 3, 1, 2)
    label, certainty = torch.tensor([[[0, 2]]]), torch.tensor([[[1.0, 0.5]]])
    expected = -(math.log(0.5) + 0.5 * math.log(0.8)) / 2
    assert math.isclose(weighted_cross_entropy(logits, label, certainty), expected, abs_tol=1e-6)


def test_loss_without_certainty_is_plain_cross_entropy():
    logits, label = rand(2, 4, 3, 3, seed=7), torch.randint(4, (2, 3, 3), generator=generator(8))
    label[0, 0] = 255
    plain = F.cross_entropy(logits, label, ignore_index=255)
    assert torch.allclose(weighted_cross_entropy(logits, label), plain)


def test_pixels_without_a_label_do_not_matter():
    logits, label = rand(1, 3, 1, 4, seed=9), torch.tensor([[[1, -1, 255, 2]]])
    kept = weighted_cross_entropy(logits[..., [0, 3]], label[..., [0, 3]])
    assert torch.allclose(weighted_cross_entropy(logits, label), kept)


def test_loss_of_an_image_without_any_label_is_zero_and_has_a_gradient():
    logits = rand(1, 3, 2, 2).requires_grad_()
    loss = weighted_cross_entropy(logits, torch.full((1, 2, 2), -1))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


# K-means and regions


def test_two_tight_groups_are_found():
    points = F.normalize(
        torch.tensor([[1.0, 0.01], [1.0, -0.01], [0.01, 1.0], [-0.01, 1.0]]), dim=1
    )
    centroids, assignment = kmeans(points, 2, generator())
    assert assignment[0] == assignment[1] != assignment[2] == assignment[3]
    assert torch.allclose(centroids[assignment[0]], torch.tensor([1.0, 0.0]), atol=1e-3)


def test_identical_points_give_one_cluster():
    centroids, assignment = kmeans(torch.tensor([[1.0, 0.0]] * 6), 2, generator())
    assert len(centroids) == 1 and not assignment.any()


def test_kmeans_is_a_fixed_point_and_depends_on_its_seed_alone():
    points = F.normalize(rand(60, 8, seed=10), dim=1)
    centroids, assignment = kmeans(points, 3, generator(1))
    again, same = kmeans(points, 3, generator(1))
    assert torch.equal(centroids, again) and torch.equal(assignment, same)
    assert torch.equal((points @ centroids.T).argmax(1), assignment)
    for k in range(3):
        mean = F.normalize(points[assignment == k].sum(0), dim=0)
        assert torch.allclose(centroids[k], mean, atol=1e-5)


def test_cells_take_the_label_of_most_of_their_pixels():
    label = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 2], [255, 255, 2, 2], [255, 255, 2, 0]])
    assert cell_labels(label, (2, 2)).tolist() == [[1, 0], [255, 2]]


def test_ignored_pixels_have_no_vote():
    label = torch.tensor([[255, 255], [255, 3]])
    assert cell_labels(label, (1, 1)).tolist() == [[3]]


def test_class_that_wins_no_cell_keeps_one():
    label = torch.zeros(4, 4, dtype=torch.long)
    label[3, 3] = 5
    assert cell_labels(label, (2, 2)).tolist() == [[0, 0], [0, 5]]


def test_cells_of_a_size_that_does_not_divide_the_image():
    label = torch.zeros(7, 5, dtype=torch.long)
    label[:, 3:] = 1
    assert cell_labels(label, (3, 2)).tolist() == [[0, 1]] * 3


def test_each_region_has_its_own_centroids():
    feat = torch.zeros(3, 4, 4)
    feat[0, :2], feat[1, 2:, :2], feat[2, 2:, 2:] = 1, 1, 1
    label = torch.zeros(4, 4, dtype=torch.long)
    label[2:] = 7  # the region holds two kinds of features, the background one
    centroids, cells = image_centroids(feat, label, 2, 2, generator())
    assert {k: len(v) for k, v in centroids.items()} == {0: 1, 7: 2}
    assert torch.allclose(centroids[7].sum(0), torch.tensor([0.0, 1.0, 1.0]))
    assert (cells[:2] == 0).all() and cells[2, 0] != cells[2, 3]


def test_tiny_region_has_its_mean_for_centroid():
    feat = rand(3, 2, 2)
    label = torch.tensor([[1, 0], [0, 0]])
    centroids, _ = image_centroids(feat, label, 2, 2, generator())
    assert torch.allclose(centroids[1][0], F.normalize(feat[:, 0, 0], dim=0), atol=1e-6)


def test_image_that_is_all_ignored_has_no_centroids():
    centroids, cells = image_centroids(rand(3, 2, 2), torch.full((4, 4), 255), 2, 2, generator())
    assert centroids == {} and (cells == -1).all()


def test_score_is_the_best_similarity_over_all_classes_of_the_image():
    feat = torch.tensor([[[1.0, 0.0, -1.0]], [[0.0, 2.0, 0.0]]])  # (2, 1, 3)
    centroids = torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    both = debiased_score(feat, centroids, torch.tensor([True, True]))
    assert torch.allclose(both, torch.tensor([[1.0, 1.0, 0.0]]))
    first = debiased_score(feat, centroids, torch.tensor([True, False]))
    assert torch.allclose(first, torch.tensor([[1.0, 0.0, 0.0]]))


def test_score_equals_the_naive_loop():
    feat, centroids, tags = rand(6, 4, 5, seed=5), rand(3, 6, seed=6), torch.tensor([1, 0, 1])
    score = debiased_score(feat, centroids, tags)
    for y in range(4):
        for x in range(5):
            best = max(F.cosine_similarity(feat[:, y, x], centroids[c], dim=0) for c in (0, 2))
            assert math.isclose(score[y, x], max(best, 0), abs_tol=1e-6)


def test_image_without_tags_is_similar_to_nothing():
    assert not debiased_score(rand(3, 2, 2), rand(2, 3), torch.zeros(2)).any()


def test_class_without_centroid_is_similar_to_nothing():
    assert not debiased_score(rand(3, 2, 2), torch.zeros(1, 3), torch.ones(1)).any()
