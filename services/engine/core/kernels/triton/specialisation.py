"""Forms of kernels in Triton that are known ahead, so that they can be compiled without a GPU.

Each module of this package lists the forms that models use as `COMPILED`. A test compiles them all
for every generation of cards: the interpreter accepts much that the compiler refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

AMPERE, ADA, HOPPER = 80, 89, 90


@dataclass(frozen=True, slots=True)
class Specialisation:
    """One form of a kernel: the types of what it is called with, and the values of constants.

    signature: by parameter, a type as Triton writes it: "*bf16", "*fp8e4nv", "i32", "fp32". A
        pointer is taken to be a multiple of 16 bytes, as what torch allocates is; "i32:16" is a
        number that is a multiple of 16, as strides mostly are.
    constants: by parameter, of all that the signature does not name: `tl.constexpr`s, and arguments
        that are None or 1, which Triton makes constants of.
    since: the oldest generation of cards it is for, as a compute capability: 80, 89 or 90.
    spills: why its registers may not suffice, where they do not.
    """

    kernel: Any  # a triton.JITFunction, or an Autotuner of one
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    since: int = AMPERE
    spills: str = ""

    @property
    def capability(self) -> int:
        """The oldest generation that it can be compiled for: before Ada there are no fp8 units."""
        types = [*self.signature.values(), *map(str, self.constants.values())]
        return max(self.since, ADA if any("fp8e4nv" in each for each in types) else AMPERE)
