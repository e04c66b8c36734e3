"""Lipcert: train classifiers whose robustness can be proved, and prove it."""

__version__ = "0.1.0.dev0"
