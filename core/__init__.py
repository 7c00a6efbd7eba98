"""MARS: model-agnostic biased object removal for weakly-supervised semantic segmentation.

The scripts at the top of the repository run the stages; this package holds what they share.
"""

import os

if os.environ.get("RANK", "0") != "0":  # tqdm looks once, when it is imported
    os.environ.setdefault("TQDM_DISABLE", "1")
