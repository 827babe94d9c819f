"""Counter-based random numbers: a sample's noise depends on its seed and position alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    # The finaliser of SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number
    # Generators", OOPSLA 2014). Unsigned arithmetic wraps, as it must.
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def stream_key(seed: int, choice_index: int) -> int:
    """The key of the noise of one choice of a request with this seed, in [0, 2**64)."""
    seeded = _mix(np.array([seed], np.uint64) + _GOLDEN)
    return int(_mix(seeded ^ _mix(np.array([choice_index], np.uint64)))[0])


def uniforms(
    keys: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1): element `positions[i]` of the SplitMix64 stream `keys[i]`.

    They have 52 bits, so that u * total < total holds in float64 for every total > 0.
    """
    counters = positions.astype(np.uint64) + np.uint64(1)
    return (_mix(keys + counters * _GOLDEN) >> np.uint64(12)).astype(np.float64) * 2.0**-52
