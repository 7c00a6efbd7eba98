"""Dense conditional random field: probabilities that follow the edges of the image.

Every pair of pixels is linked, the more strongly the closer and the more alike in colour
(Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge
Potentials", 2011). With the unary U = -log(probability) and the Potts model, mean field repeats,
for all pixels at once,

    Q <- softmax(-U + w_g K~_g Q + w_b K~_b Q),    Q = softmax(-U) at first,

where K~_g is a normalised Gaussian over position and K~_b one over position and colour. Our own
backends are `numba`, the fastest on a CPU, and `torch` for GPUs; `pydensecrf` is the original, from
which they differ by rounding and by computing K~_g exactly instead of on a lattice. Only `torch`
needs torch.
"""

import dataclasses
import importlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jsonargparse.typing import restricted_number_type

from core.run.errors import UserError
from core.run.settings import NonNegativeFloat, NonNegativeInt, PositiveFloat

Relaxation = restricted_number_type("Relaxation", float, [(">", 0), ("<", 2)])
Vertices = restricted_number_type("Vertices", int, [(">=", 1), ("<=", 6)])

REMEDIES = {
    "numba": "pip install numba",
    "torch": "pip install torch",
    "pydensecrf": "pip install pydensecrf2 (needs a C++ compiler and Python 3.12 or older)",
}


@dataclass
class CrfConfig:
    """Dense CRF; kernel widths in pixels and grey levels of the image it runs on."""

    # auto: torch where the stage runs on a GPU, else numba if installed, else pydensecrf.
    backend: Literal["auto", "numba", "torch", "pydensecrf"] = "auto"
    iterations: NonNegativeInt = 10  # Mean-field iterations (the author's usual settings).
    sxy_gaussian: PositiveFloat = 1  # Width of the spatial kernel, pixels.
    weight_gaussian: NonNegativeFloat = 3  # Weight of the spatial kernel.
    sxy_bilateral: PositiveFloat = 67  # Spatial width of the bilateral kernel, pixels.
    srgb_bilateral: PositiveFloat = 3  # Colour width of the bilateral kernel, grey levels.
    weight_bilateral: NonNegativeFloat = 4  # Weight of the bilateral kernel.
    # Step of mean field, in (0, 2); 1.8 needs 6 iterations instead of 10. Not for pydensecrf.
    relaxation: Relaxation = 1
    # Lattice points per pixel, 1 to 6; 3 or 4 are faster. Not for pydensecrf.
    vertices: Vertices = 6


class DenseCRF:
    """Refines class probabilities by mean field in a dense CRF.

    An object holds settings only, so threads may share it and processes may copy it; the numba
    backend releases the GIL, so a thread pool refines several images at once.

    Args:
        backend: "numba"; "torch"; "pydensecrf"; or "auto": "torch" if `device` is a GPU, else the
            first of the others that is installed.
        device: where `torch` refines, "cpu" or "cuda".
        settings: the other fields of `CrfConfig`. With 0 `iterations` the result is the unary's
            posterior; each iteration moves the logits `relaxation` times as far as mean field
            would. A pixel is carried to the `vertices` corners of its simplex with the largest
            weights; 6 is exact.

    Raises:
        UserError: the backend is not installed, or is pydensecrf, which has neither `relaxation`
            nor `vertices`, and one of them is asked for.
        ValueError: no such backend, or a setting is out of range.
    """

    def __init__(self, backend: str = "auto", device: str = "cpu", **settings: float):
        config = CrfConfig(backend, **settings)
        for item in dataclasses.fields(config)[1:]:
            value = getattr(config, item.name)
            try:
                item.type(value)  # the types have the ranges, but let infinity pass
                if np.isinf(value):
                    raise ValueError(f"{value} is not finite")
            except ValueError as error:
                raise ValueError(f"{item.name}: {error}") from None
            setattr(self, item.name, value)
        self.iterations, self.vertices = int(self.iterations), int(self.vertices)  # 10.0 is whole
        gpu = backend == "auto" and device.startswith("cuda")
        self.backend, self.device = _choose("torch" if gpu else backend), device
        if self.backend == "pydensecrf" and (config.relaxation, config.vertices) != (1, 6):
            remedy = f"{REMEDIES['numba']}, or set crf.relaxation 1 and crf.vertices 6"
            raise UserError(f"dense CRF: pydensecrf has no relaxation and no vertices; {remedy}")

    def __call__(self, image: np.ndarray, probs: np.ndarray) -> np.ndarray:
        """Refines one image's probabilities to an (L, H, W) float32 posterior; it sums to 1 over L.

        The cost grows with L: pass the labels that may occur in the image, not all of them.

        Args:
            image: (H, W, 3) uint8, the RGB image itself, not a normalised one.
            probs: (L, H, W) float32 in [0, 1], L >= 1; clipped to [1e-5, 1]; any sum over L.

        Raises:
            ValueError: a wrong type or shape, sizes that differ, or values outside [0, 1].
        """
        _check(image, probs)
        if len(probs) == 1:
            return np.ones_like(probs)
        if self.backend == "torch":
            return self._infer_torch(image, probs)
        unary = -np.log(np.clip(probs, 1e-5, 1)).reshape(len(probs), -1)
        unary = np.ascontiguousarray(unary)  # `probs` may be a transposed view
        infer = self._infer_pydensecrf if self.backend == "pydensecrf" else self._infer_numba
        return infer(image, unary).reshape(probs.shape)  # `infer` gives (L, N), as `unary` is

    def _infer_numba(self, image: np.ndarray, unary: np.ndarray) -> np.ndarray:
        filters = self._filters(image)
        # A softmax does not change when the same is added to all labels, and the kernels are
        # linear. So label 0 can be subtracted from the others, in the logits and in Q: L - 1
        # channels say exactly what L do, and the usual two labels need only one, at half the cost.
        given = unary[0] - unary[1:]  # (L - 1, N) logits of labels 1, 2, ... relative to label 0
        logits = given
        for _ in range(self.iterations):
            relative = _relative_posterior(logits)
            updated = given.copy()
            for gaussian in filters:
                gaussian.add_to(updated, relative)
            if self.relaxation != 1:
                updated += np.float32(self.relaxation - 1) * (updated - logits)
            logits = updated
        return _posterior(logits)

    def _filters(self, image: np.ndarray) -> list[Any]:
        """w_g K~_g and w_b K~_b, without those of weight 0."""
        # Here, because numba takes a moment to import and may be absent where pydensecrf is used.
        from core.crf.permutohedral import LatticeFilter
        from core.crf.spatial import GridFilter

        height, width = image.shape[:2]
        filters = []
        if self.weight_gaussian > 0:
            filters.append(GridFilter(height, width, self.sxy_gaussian, self.weight_gaussian))
        if self.weight_bilateral > 0:
            features = np.empty((5, height, width), np.float32)
            features[0] = np.arange(width) / self.sxy_bilateral
            features[1] = np.arange(height)[:, None] / self.sxy_bilateral
            features[2:] = image.transpose(2, 0, 1) / np.float32(self.srgb_bilateral)
            features = features.reshape(5, -1)
            filters.append(LatticeFilter(features, self.weight_bilateral, self.vertices))
        return filters

    def _infer_torch(self, image: np.ndarray, probs: np.ndarray) -> np.ndarray:
        import torch

        from core.crf.batched import refine

        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        tensors = (t[None].to(self.device) for t in (pixels, torch.from_numpy(probs)))
        return refine(*tensors, self)[0].cpu().numpy()

    def _infer_pydensecrf(self, image: np.ndarray, unary: np.ndarray) -> np.ndarray:
        from pydensecrf.densecrf import DenseCRF2D

        height, width = image.shape[:2]
        crf = DenseCRF2D(width, height, len(unary))
        crf.setUnaryEnergy(unary)
        # Both default to Potts compatibility and symmetric normalisation.
        if self.weight_gaussian > 0:
            crf.addPairwiseGaussian(sxy=self.sxy_gaussian, compat=self.weight_gaussian)
        if self.weight_bilateral > 0:
            pixels = np.require(image, requirements="CW")  # no views, nothing read-only
            sxy, srgb = self.sxy_bilateral, self.srgb_bilateral
            crf.addPairwiseBilateral(sxy=sxy, srgb=srgb, rgbim=pixels, compat=self.weight_bilateral)
        return np.array(crf.inference(self.iterations), np.float32)


def make_crf(config: CrfConfig, device: Any = "cpu") -> DenseCRF:
    """The CRF of a stage that runs on a device; prints its backend."""
    if str(device) == "cuda":  # in another thread, that would be the first GPU
        import torch

        device = torch.device("cuda", torch.cuda.current_device())
    crf = DenseCRF(**dataclasses.asdict(config), device=str(device))
    print(f"dense CRF: {crf.backend}", flush=True)
    return crf


def _choose(backend: str) -> str:
    if backend not in ("auto", *REMEDIES):
        raise ValueError(f'backend must be one of auto, {", ".join(REMEDIES)}, got "{backend}"')
    wanted = ["numba", "pydensecrf"] if backend == "auto" else [backend]
    for name in wanted:
        try:
            importlib.import_module("pydensecrf.densecrf" if name == "pydensecrf" else name)
            return name
        except ImportError as error:
            reason = error
    remedy = ", or ".join(REMEDIES[name] for name in wanted)
    raise UserError(f'dense CRF: backend "{backend}" cannot be imported; {remedy}') from reason


def _check(image: np.ndarray, probs: np.ndarray) -> None:
    forms = ("image", image, "(H, W, 3)", "uint8"), ("probs", probs, "(L, H, W)", "float32")
    for name, array, shape, dtype in forms:
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 3:
            got = f"{array.shape} {array.dtype}" if isinstance(array, np.ndarray) else type(array)
            raise ValueError(f"{name} must be a {shape} {dtype} array, got {got}")
    if image.shape[2] != 3:
        raise ValueError(f"image must have 3 channels, last, got shape {image.shape}")
    if 0 in probs.shape or probs.shape[1:] != image.shape[:2]:
        form = f"(L, H, W) with L >= 1 and the image's height and width {image.shape[:2]}"
        raise ValueError(f"probs must be {form}, got {probs.shape}")
    low, high = probs.min(), probs.max()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # written so that NaN is refused, too
        raise ValueError(f"probs must lie in [0, 1], got {low} to {high}; apply softmax to logits")


def _posterior(logits: np.ndarray) -> np.ndarray:
    """(L - 1, N) logits relative to label 0 -> (L, N) probabilities."""
    logits = np.concatenate([np.zeros_like(logits[:1]), logits])
    logits -= logits.max(0)
    probs = np.exp(logits, out=logits)
    probs /= probs.sum(0)
    return probs


def _relative_posterior(logits: np.ndarray) -> np.ndarray:
    """(L - 1, N) relative logits -> (L - 1, N) probabilities minus label 0's."""
    if len(logits) == 1:
        return np.tanh(logits / 2)  # equals sigmoid(x) - sigmoid(-x), the same in one step
    probs = _posterior(logits)
    return probs[1:] - probs[0]
