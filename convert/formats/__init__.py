"""The file formats that weights are read from and written to."""
