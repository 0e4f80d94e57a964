"""A classifier behind HTTP: pictures come in, and are computed in batches of a few sizes that are compiled ahead."""
