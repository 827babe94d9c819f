"""Moving whole blocks of the paged KV cache: within it, and to and from the host's memory."""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.core.kernels.registry import declare


@declare
def copy_blocks(
    storage: Tensor, scales: Tensor | None, sources: Tensor, destinations: Tensor
) -> None:
    """Copy blocks of all layers, keys and values.

    storage: [layers, 2, num_blocks, ...], contiguous; scales: the same of what the format has
    beside; sources, destinations: int64, on the same device. No destination is a source or
    another's destination.
    """
    for part in (storage, scales):
        if part is not None:
            part[:, :, destinations] = part[:, :, sources]


@declare
def swap_blocks(
    storage: Tensor,
    scales: Tensor | None,
    blocks: Tensor,
    host: Tensor,
    rows: Tensor,
    *,
    to_host: bool,
) -> None:
    """Copy blocks to rows of the host's memory, or from there.

    storage, scales: as `copy_blocks` has them; blocks, rows: int64, on their device; host: [rows,
    bytes] uint8, pinned where the cache is on a GPU: of each layer its keys and its values, and
    behind these the scales of all.
    """
    rows = rows.to(host.device)
    begin = 0
    for part in (storage, scales):
        if part is None:
            continue
        every = part.view(torch.uint8).flatten(0, 1).flatten(2)  # [layers * 2, blocks, bytes]
        layers, _, num_bytes = every.shape
        end = begin + layers * num_bytes
        if to_host:
            host[rows, begin:end] = every[:, blocks].transpose(0, 1).flatten(1).to(host.device)
        else:
            found = host[rows, begin:end].to(every.device).view(len(rows), layers, num_bytes)
            every[:, blocks] = found.transpose(0, 1)
        begin = end
