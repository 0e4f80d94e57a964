"""Data sets, and the batches that are read from them."""
