"""Side-by-side timings against timm. Importing the package imports no framework."""
