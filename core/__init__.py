"""MARS: model-agnostic biased object removal for weakly-supervised semantic segmentation.

The scripts at the top of the repository run the stages; this package holds what they share.
"""
