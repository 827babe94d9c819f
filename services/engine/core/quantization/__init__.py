"""Rounding a model's matrices to 4 and 8 bits, and writing what comes of it."""
