"""Networks: tensors in, tensors out, no files."""
