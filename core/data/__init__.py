"""Images, tags and label maps: lists, files, views and batches."""
