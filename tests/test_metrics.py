import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as sklearn_matrix
from sklearn.metrics import jaccard_score

from core.metrics import confusion_matrix, scores


def random_pair(seed: int, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes + 1, (40, 30)).astype(np.uint8)
    guess = np.where(
        rng.random(truth.shape) < 0.7, truth, rng.integers(0, classes + 1, truth.shape)
    )
    truth[rng.random(truth.shape) < 0.1] = 255
    return guess.astype(np.uint8), truth


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_an_independent_implementation(seed):
    guess, truth = random_pair(seed)
    valid = truth != 255
    matrix = confusion_matrix(guess, truth, 4)
    assert np.array_equal(matrix, sklearn_matrix(truth[valid], guess[valid], labels=range(5)))
    expected = jaccard_score(truth[valid], guess[valid], labels=range(5), average=None)
    assert np.allclose(scores(matrix).iou, expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (33, 20)])
@pytest.mark.parametrize("seed", range(4))
def test_counts_equal_those_of_bincount(shape, seed):
    rng = np.random.default_rng(seed)
    truth = rng.choice([*range(21), 255], shape).astype(np.uint8)
    guess = rng.choice([*range(21), 200, 254, 255], shape).astype(np.uint8)
    if seed % 2:  # runs of different lengths
        truth, guess = np.sort(truth.ravel()).reshape(shape), np.sort(guess, axis=None)
        guess = guess.reshape(shape)
    valid = truth != 255
    pairs = truth[valid] * np.int64(21) + np.where(guess > 20, 0, guess)[valid]
    expected = np.bincount(pairs, minlength=441).reshape(21, 21)
    assert np.array_equal(confusion_matrix(guess, truth, 20), expected)


def test_empty_maps_count_nothing():
    nothing = np.zeros((0, 5), np.uint8)
    assert not confusion_matrix(nothing, nothing, 2).any()


def test_hand_made_case():
    truth = np.array([[0, 0, 1, 1, 1, 255]], np.uint8)
    guess = np.array([[0, 1, 1, 1, 0, 1]], np.uint8)
    s = scores(confusion_matrix(guess, truth, 1))
    assert np.allclose(s.iou, [1 / 3, 2 / 4])
    assert np.allclose(s.fp, [1 / 3, 1 / 4]) and np.allclose(s.fn, [1 / 3, 1 / 4])
    assert np.isclose(s.fp_per_tp[1], 1 / 2) and np.isclose(s.fn_per_tp[1], 1 / 2)
    assert np.isclose(s.miou, 5 / 12)


def test_iou_fp_and_fn_add_up_to_one():
    s = scores(confusion_matrix(*random_pair(5), 4))
    assert np.allclose(s.iou + s.fp + s.fn, 1)


def test_biased_and_ignored_predictions_count_as_background():
    truth = np.array([[0, 1]], np.uint8)
    matrix = confusion_matrix(np.array([[254, 255]], np.uint8), truth, 1)
    assert matrix.tolist() == [[1, 0], [1, 0]]


def test_class_that_occurs_nowhere_is_left_out_of_the_means():
    label = np.array([[0, 1]], np.uint8)
    s = scores(confusion_matrix(label, label, 2))
    assert np.isnan(s.iou[2]) and s.miou == 1 and s.mean(s.fp) == 0
    assert np.isnan(s.mean(s.iou, [2]))


def test_counts_are_exact_beyond_32_bits():
    matrix = np.full((2, 2), 2**40, np.int64)
    assert scores(matrix).iou.tolist() == [1 / 3, 1 / 3]
