"""Small integers packed into 32-bit words, as checkpoints of GPTQ and its kin hold them."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack(words: Tensor, bits: int) -> Tensor:
    """Return the integers of each word, lowest first: uint8 [*words.shape, 32 / bits].

    words: int32; bits: 4 or 8.
    """
    data = words.reshape(-1).view(torch.uint8).view(*words.shape, 4)
    if bits == 8:
        return data
    return torch.stack((data & 0xF, data >> 4), dim=-1).flatten(-2)


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, columns] whose words go down the rows -> uint8 [rows * 32 / bits, columns]."""
    return unpack(words, bits).transpose(1, 2).flatten(0, 1)


def unpack_columns(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, columns] whose words go along the columns -> [rows, columns * 32 / bits]."""
    return unpack(words, bits).flatten(1)


def pack_columns(levels: Tensor, bits: int) -> Tensor:
    """What `unpack_columns` undoes: uint8 [rows, columns], below 2**bits -> int32 words."""
    if bits == 4:
        pairs = levels.view(len(levels), -1, 2)
        levels = pairs[..., 0] | (pairs[..., 1] << 4)
    return levels.contiguous().view(torch.int32)
