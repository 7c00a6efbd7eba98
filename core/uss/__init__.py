"""Stage 1, unsupervised semantic features: one file for each method."""
