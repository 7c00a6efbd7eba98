"""Titles of pseudo labels, methods, features and training modes in all tables and figures."""

LABELS = {  # evaluation name: title, meaning
    "labels_wsss": ("WSSS pseudo labels", "the classifier's maps at the configured threshold"),
    "labels_wsss_best": ("WSSS labels, best threshold", "the same, best threshold in hindsight"),
    "labels_debias": ("Debiased labels", "biased pixels count as background here"),
}
MODES = {  # evaluation name: title, meaning
    "wsss": ("WSSS", "trained on the unchanged pseudo labels"),
    "wsss_best": ("WSSS, best threshold", "trained on the best labels that a threshold can give"),
    "ignore": ("Ignore", "biased pixels left out of the loss"),
    "complement": ("Complement", "the teacher fills biased pixels"),
    "mars": ("MARS", "filled by the teacher, weighted by its certainty"),
    "supervised": ("Fully supervised", "trained on ground truth, the upper bound"),
}
BEFORE_AND_AFTER = {mode: MODES[mode][0] for mode in ("wsss", "mars", "supervised")}
"""The columns of the paper's Tables 3 and 5."""

METHODS = {
    "cam": "CAM",
    "irn": "IRNet",
    "seam": "SEAM",
    "advcam": "AdvCAM",
    "rsepm": "RS+EPM",
}
RECONSTRUCTED = "RS+EPM is our reconstruction of that method."

FEATURES = {
    "none": "none (WSSS)",
    "demo": "self-supervised ViT (the demo's)",
    "leopart": "Leopart",
    "stego": "STEGO",
    "classifier": "control: the method's own classifier",
    "random": "control: the same ViT, random weights",
}
