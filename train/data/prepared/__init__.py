"""Data sets that were prepared before, by tensorflow-datasets or Hugging Face `datasets`, with random access."""
