"""The trainer: `python -m train.main --variant ti`. Its modules are imported one by one; this package imports nothing."""
