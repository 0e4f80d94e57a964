"""Data sets whose pictures have boxes or masks."""
