"""Exports the backbone of a checkpoint as a small file for `backbone.weights`.

    python tools/export_backbone.py CHECKPOINT data/demo/classifier.safetensors

Takes the backbone of a classifier (train_wsss.py) or of features (train_uss.py), in float16. The
file's header records its origin under `made_from`.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.run import checkpoint
from core.run.errors import UserError, run_script
from core.run.files import atomic_write, user_path
from tools.common import tool_parser

PREFIX = "backbone.net."


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("checkpoint", type=user_path)
    parser.add_argument("output", type=user_path, help="a .safetensors file")
    options = parser.parse_args()
    content = checkpoint.load(options.checkpoint)
    state = content.get("network", {})
    tensors = {
        key.removeprefix(PREFIX): value.to(torch.float16).contiguous()
        for key, value in state.items()
        if key.startswith(PREFIX) and value.is_floating_point()
    }
    if not tensors:
        raise UserError(f"{options.checkpoint} has no network with a backbone; train stage 1 or 2")
    with atomic_write(options.output) as tmp:
        tmp.write_bytes(save(tensors, {"made_from": json.dumps(content.get("made_from"))}))
    digest = hashlib.sha256(options.output.read_bytes()).hexdigest()
    print(f"{options.output}: {options.output.stat().st_size} bytes, SHA-256 {digest}")


if __name__ == "__main__":
    run_script(main)
