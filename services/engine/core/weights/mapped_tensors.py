"""Tensors that lie in a mapped file."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor


def as_tensor(raw: np.ndarray) -> Tensor:
    """Return bytes of a file as a tensor of the same shape, not copied and not to be changed.

    Changing it would end the process: the file's pages cannot be written.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(raw)
