"""A video language model that spends one token on each frame, and decides itself where to look."""

__version__ = "0.1.0"
