"""The trainer: `python -m train.main --variant ti`. Importing the package imports none of its modules."""
