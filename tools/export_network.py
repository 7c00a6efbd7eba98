"""Writes a trained segmenter as one file that runs without this code.

    python tools/export_network.py --config configs/demo.yaml --output boats.onnx
    python tools/export_network.py --weights checkpoint.pth --output boats.pt2

The EMA teacher, as .onnx for ONNX runtimes (needs onnx, onnxscript and onnxruntime) or as .pt2, the
archive of torch.export, which torch.export.load reads. Input: (B, 3, H, W) float32 RGB from 0 to
255, any size; output: (B, 1 + C, H, W) probabilities, background first. Normalisation is inside;
class names and the side of the training crops are in the file. tools/predict.py --network runs it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.config import make_parser, parse
from core.pipeline import Run, load_segmenter, trained_weights
from core.run.errors import run_script
from tools.exchange.networks import save_network


def main() -> None:
    parser = make_parser("export_network.py", __doc__)
    parser.add_argument("--output", type=str, required=True, help="A .onnx or .pt2 file.")
    parser.add_argument("--weights", type=str | None, help="A checkpoint; else run_dir's.")
    config, options = parse(parser, named=False)
    weights = trained_weights(Run(config), options.weights)
    network, classes = load_segmenter(weights, config, configured=not options.weights)
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    crop = config.segmentation.augment.crop
    difference = save_network(network, classes, crop, output)
    print(
        f"{output}: {output.stat().st_size / 1e6:.1f} MB, classes {', '.join(classes)}\n"
        f"probabilities differ from the checkpoint's by at most {difference:.1e}"
    )


if __name__ == "__main__":
    run_script(main)
