"""Refinement of probabilities along the edges of the image."""
