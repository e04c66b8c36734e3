"""Plain PyTorch modules with known Lipschitz constants; they know nothing of bounds."""

from lipcert.layers.activations import MaxMin, Normalize

__all__ = ["MaxMin", "Normalize"]
