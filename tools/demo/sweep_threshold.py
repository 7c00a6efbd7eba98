"""Finds the label threshold that scores best on the training masks: the best case of plain labels.

    python tools/demo/sweep_threshold.py --config configs/demo.yaml

It uses ground truth, so its labels serve the baseline only; stage 3 never sees them. Writes
<run_dir>/wsss/threshold_sweep.json, and the pseudo labels at the best threshold to
<run_dir>/wsss/labels_best/.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.config import make_parser, parse
from core.crf.dense import make_crf
from core.data.labels import read_label, write_label
from core.data.lists import ground_truth, read_split
from core.metrics import confusion_matrix, scores
from core.pipeline import Run, check_upstream
from core.run.errors import run_script
from core.run.files import read_json, write_json
from core.run.stage import SIGNATURE
from core.run.threads import in_threads
from core.wsss.cam import background_score, cam_label, load_cam

THRESHOLDS = (0.20, 0.25, 0.30, 0.35, 0.40, 0.45, 0.50, 0.60)


def main() -> None:
    parser = make_parser("sweep_threshold.py", __doc__)
    parser.add_argument("--every", type=int, default=4, help="score every n-th training image")
    config, options = parse(parser)
    run, split = Run(config), read_split(config.data, "train")
    check_upstream(config, split, "wsss")
    settings = config.wsss
    crf = make_crf(settings.crf) if settings.refine == "crf" else None
    masks = ground_truth(config.data, split)
    classes = config.data.classes

    configured = settings.threshold
    if settings.object_share is not None:
        maps = [run.wsss / "cams" / f"{i}.npz" for i in split.ids]
        configured = background_score(settings.object_share, maps)

    def label(index: int, threshold: float) -> np.ndarray:
        keys, cam = load_cam(run.wsss / "cams" / f"{split.ids[index]}.npz")
        sharpness = config.wsss.sharpness
        return cam_label(split.read_image(index), keys, cam, threshold, crf, sharpness)

    def counts(index: int) -> np.ndarray:
        truth = read_label(masks[index], len(classes))
        found = [confusion_matrix(label(index, t), truth, len(classes)) for t in THRESHOLDS]
        return np.stack(found)

    def write_best(index: int) -> None:
        write_label(run.wsss / "labels_best" / f"{split.ids[index]}.png", label(index, best))

    chosen, everything = range(0, len(split), options.every), range(len(split))
    matrices = sum(in_threads(counts, chosen, config.workers, "thresholds", len(chosen)))
    biased = [1 + classes.index(c) for c in config.data.biased_classes]
    others = [c for c in range(1, len(classes) + 1) if c not in biased]
    rows = []
    for threshold, matrix in zip(THRESHOLDS, matrices, strict=True):
        s = scores(matrix)
        row = {"threshold": threshold, "miou": s.miou}
        row |= {"biased": s.mean(s.iou, biased), "unbiased": s.mean(s.iou, others)}
        rows.append({k: round(v, 6) if np.isfinite(v) else None for k, v in row.items()})
    best = max(rows, key=lambda row: row["miou"])["threshold"]
    if (run.wsss / "cams" / SIGNATURE).is_file():
        made_from = read_json(run.wsss / "cams" / SIGNATURE)
        made_from["stage"] = "the best threshold in hindsight"
        made_from["settings"] |= {"wsss.threshold": best, "wsss.object_share": None}
        write_json(run.wsss / "labels_best" / SIGNATURE, made_from)
    for _ in in_threads(write_best, everything, config.workers, "labels", len(split)):
        pass
    sweep = {"scores": rows, "chosen": best, "configured": configured}
    sweep |= {"images": len(chosen), "note": "chosen on training masks, for the baseline only"}
    write_json(run.wsss / "threshold_sweep.json", sweep)
    for row in rows:
        print("  ".join(f"{k} {v:.3f}" for k, v in row.items() if v is not None))
    print(f"best threshold {best} (configured {configured})")


if __name__ == "__main__":
    run_script(main)
