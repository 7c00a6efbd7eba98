"""Stage 2, weakly-supervised segmentation from image tags: one file for each method."""
