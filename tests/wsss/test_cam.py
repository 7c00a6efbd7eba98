"""Files of activation maps."""

import os
import pickle
import zipfile

import numpy as np
import pytest

from core.run.errors import UserError
from core.wsss.cam import load_cam, save_cam


def test_activation_maps_survive_the_disk(tmp_path):
    maps = np.random.default_rng(0).random((2, 5, 7))
    save_cam(tmp_path / "a.npz", np.array([3, 20]), maps)
    keys, cam = load_cam(tmp_path / "a.npz")
    assert keys.tolist() == [3, 20] and cam.dtype == np.float32
    assert np.abs(cam - maps).max() < 1e-3
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("place", ["keys", "cam", "an .npy file", "a pickle"])
def test_malicious_activation_maps_are_refused_unexecuted(tmp_path, place):
    path, trace = tmp_path / "a.npz", tmp_path / "executed"
    content = {"keys": np.array([1], np.int16), "cam": np.zeros((1, 2, 2), np.float16)}
    if place == "a pickle":
        path.write_bytes(pickle.dumps(Malicious(trace)))
    elif place == "an .npy file":
        with path.open("wb") as file:
            np.lib.format.write_array(file, np.array([Malicious(trace)], object))
    else:
        np.savez(path, **content | {place: np.array([Malicious(trace)], object)})
    with pytest.raises(UserError, match="a.npz cannot be read"):
        load_cam(path)
    assert not trace.exists()
    # Unsafe on purpose, on the file written above: shows that it would have run what it carries, so
    # that the refusal before is not one of a harmless file.
    loaded = np.load(path, allow_pickle=True)
    if place in content:
        with loaded:
            assert loaded[place].shape == (1,)
    assert trace.exists()  # the file does carry the attack


@pytest.mark.parametrize("defect", ["truncated", "overwritten", "empty", "text", "lacks cam"])
def test_broken_activation_maps_are_named(tmp_path, defect):
    path = tmp_path / "a.npz"
    save_cam(path, np.array([1]), np.ones((1, 9, 9)))
    data = path.read_bytes()
    if defect == "lacks cam":
        with zipfile.ZipFile(path) as file:
            keys = file.read("keys.npy")
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("keys.npy", keys)
    else:
        middle = data[:200] + b"\x5a" * 60 + data[260:]
        content = {"truncated": data[:300], "overwritten": middle, "empty": b"", "text": b"text"}
        path.write_bytes(content[defect])
    with pytest.raises(UserError, match="a.npz cannot be read .*; remove it and run train_wsss.py"):
        load_cam(path)
