"""Trained networks as one file that runs without this code: torch.export's archive, or ONNX."""

import copy
import functools
import importlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.data.transforms import MEAN, STD, normalise_unit
from core.models.deeplab import DeepLab
from core.run import vision
from core.run.errors import UserError
from core.run.files import atomic_write

SUFFIXES = (".pt2", ".onnx")
RECORD = "mars.json"  # entry of an archive
ONLY_WEIGHTS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
ONNX = "pip install -r requirements-onnx.txt"
EXAMPLE = (2, 3, 160, 224)  # a size from which nothing is taken as fixed


class Deployed(nn.Module):
    """(B, 3, H, W) float32 RGB, 0 to 255 -> (B, 1 + C, H, W) float32 probabilities, background
    first. Any H and W; normalisation and enlargement are inside."""

    def __init__(self, network: DeepLab):
        super().__init__()
        self.network = copy.deepcopy(network).float().cpu()
        for module in self.network.modules():
            if isinstance(module, vision.timm.layers.Conv2dSame):
                module.forward = functools.partial(_padded_convolution, module)

    def forward(self, image: Tensor) -> Tensor:
        logits = self.network(normalise_unit(image / 255)).float()
        size = image.shape[-2:]
        if self.network.head.averages_logits:
            return F.interpolate(logits, size, mode="bilinear").softmax(1)
        return F.interpolate(logits.softmax(1), size, mode="bilinear")


def _padded_convolution(module: nn.Conv2d, images: Tensor) -> Tensor:
    """timm's Conv2dSame; its own rounds up by floats, which an archive cannot record.

    The padding at the end is written as what is missing from the padded length, which is a multiple
    of the stride and a constant. Written with remainders instead, sizes would nest from layer to
    layer, and an archive of them takes over a minute to read.
    """
    padding: list[int] = []
    geometry = (images.shape[-2:], module.kernel_size, module.stride, module.dilation)
    for length, kernel, stride, dilation in zip(*geometry, strict=True):
        extra = (kernel - 1) * dilation
        if extra + 1 < stride:
            raise UserError(
                f"a kernel of {extra + 1} cells with stride {stride} cannot be exported"
            )
        padded = (length - 1) // stride * stride + extra + 1
        before = (extra - (length - 1) % stride) // 2 if stride > 1 else extra // 2
        padding = [before, padded - length - before, *padding]
    images = F.pad(images, padding)
    geometry = (module.stride, 0, module.dilation, module.groups)
    return F.conv2d(images, module.weight, module.bias, *geometry)


def save_network(network: DeepLab, classes: Sequence[str], crop: int, path: Path) -> float:
    """Writes a network as .pt2 or .onnx, and compares the file with the network.

    Args:
        network: the network.
        classes: names of channels 1..C.
        crop: side of the crops that it was trained on, pixels; written into the file.
        path: the file.

    Returns:
        The largest difference of a probability on a picture of another size than the export's.

    Raises:
        UserError: the suffix is none of `SUFFIXES`, or a package for ONNX is missing.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: the suffix must be one of {', '.join(SUFFIXES)}")
    deployed = Deployed(network).eval()
    record = {"classes": list(classes), "crop": crop}
    record |= {"input": "(B, 3, H, W) float32 RGB, 0 to 255", "output": "probabilities"}
    auto = torch.export.Dim.AUTO
    example = torch.rand(EXAMPLE, generator=torch.Generator().manual_seed(0)) * 255
    program = torch.export.export(
        deployed, (example,), dynamic_shapes=({0: auto, 2: auto, 3: auto},)
    )
    with atomic_write(path) as tmp:
        if path.suffix == ".pt2":
            torch.export.save(program, tmp, extra_files={RECORD: json.dumps(record)})
        else:
            for package in ("onnx", "onnxscript"):
                _needed(package)
            exported = torch.onnx.export(program, dynamo=True, verbose=False)
            exported.model.metadata_props.update({k: json.dumps(v) for k, v in record.items()})
            exported.save(tmp)
    other = torch.rand(1, 3, 131, 97, generator=torch.Generator().manual_seed(1)) * 255
    with torch.inference_mode():
        return float((read_network(path)[0](other) - deployed(other)).abs().max())


def read_network(path: Path) -> tuple[Callable[[Tensor], Tensor], tuple[str, ...]]:
    """The function of a file of `save_network`, see `Deployed`, and its class names.

    Raises:
        UserError: the file is missing, of another kind or not from this code, or onnxruntime is
            missing.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; correct --network")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: the suffix must be one of {', '.join(SUFFIXES)}")
    try:
        run, record = (_read_archive if path.suffix == ".pt2" else _read_onnx)(path)
        return run, tuple(record["classes"])
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (any exception type is possible)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is not a file of tools/export_network.py, or damaged ({reason})"
        ) from None


def _read_archive(path: Path) -> tuple[Callable[[Tensor], Tensor], dict]:
    entries = {RECORD: ""}
    # torch.export unpickles parts of an archive; with this, PyTorch refuses all but tensors there.
    before = os.environ.get(ONLY_WEIGHTS)
    os.environ[ONLY_WEIGHTS] = "1"
    try:
        program = torch.export.load(path, extra_files=entries)
    finally:
        os.environ.pop(ONLY_WEIGHTS)
        if before is not None:
            os.environ[ONLY_WEIGHTS] = before
    return program.module(), json.loads(entries[RECORD])


def _read_onnx(path: Path) -> tuple[Callable[[Tensor], Tensor], dict]:
    runtime = _needed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(path.read_bytes(), options, ["CPUExecutionProvider"])
    record = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0]), record


def _needed(package: str):
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"ONNX needs the package {package}: {ONNX}") from None


class FromFile(nn.Module):
    """A network file as `core.segmenter.predict` takes it: normalised images to log-probabilities.

    Args:
        run: function of `read_network`.
    """

    head = SimpleNamespace(averages_logits=False)

    def __init__(self, run: Callable[[Tensor], Tensor]):
        super().__init__()
        self.run = run

    def forward(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        pixels = (images.float().cpu() * std + mean) * 255
        with torch.autocast("cpu", enabled=False):
            return self.run(pixels.contiguous()).clamp(min=1e-12).log().to(images.device)
