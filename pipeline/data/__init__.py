"""Records, their sources, encoding and batches."""
