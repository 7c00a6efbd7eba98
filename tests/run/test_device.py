import pytest
import torch

from core.run.device import pick_device
from core.run.errors import UserError
from core.run.settings import Runtime


@pytest.mark.parametrize(
    ("name", "said"), [("abacus", "unknown"), ("mps", "not supported"), ("meta", "not supported")]
)
def test_other_devices_are_refused_by_name(name, said):
    with pytest.raises(UserError, match=f"'{name}' is {said}; use auto, cpu, cuda"):
        pick_device(Runtime(device=name))


def test_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device(Runtime(device="cuda:1")).index == 1
    with pytest.raises(UserError, match="'cuda:2': there are 2 GPUs"):
        pick_device(Runtime(device="cuda:2"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="3 processes on a machine with 2 GPUs; start at most 2"):
        pick_device(Runtime())
    assert pick_device(Runtime(device="cpu")).type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu_is_said():
    with pytest.raises(UserError, match="no GPU"):
        pick_device(Runtime(device="cuda"))
