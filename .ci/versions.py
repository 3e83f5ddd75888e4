"""Prints which Python, jax and friends this run uses."""

import sys
from importlib.metadata import version

names = ("jax", "jaxlib", "optax", "flax", "numpy")
print("== Python", sys.version.split()[0], *(f"{name} {version(name)}" for name in names))
