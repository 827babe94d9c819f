"""The op registry: one reference per op, implementations per device, chosen at start-up.

An op is declared where its reference is written:

    @declare
    def silu_and_mul(gate_up: Tensor) -> Tensor: ...

and an implementation registers for a device type, with a probe that says why it cannot run here:

    @silu_and_mul.implementation("cuda", name="triton", unavailable=triton_is_missing)
    def silu_and_mul_triton(gate_up: Tensor) -> Tensor: ...

Calling the op runs what `select` chose for the device of its first argument, and the reference
until then. The reference stays callable as `op.reference`, which is what tests hold the others to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

REFERENCE = "reference"


def _always() -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Implementation(Generic[P, R]):
    """One form of an op; `unavailable()` is None where it can run, else the reason it cannot."""

    name: str
    run: Callable[P, R]
    unavailable: Callable[[], str | None]


@dataclass(frozen=True, slots=True)
class Selection:
    """What was chosen for one op, and why each better one (registered later) was not."""

    op: str
    implementation: str
    passed_over: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        reasons = "".join(f"; {name}: {reason}" for name, reason in self.passed_over)
        return f"{self.op}: {self.implementation}{reasons}"


class Op(Generic[P, R]):
    """An operation with one meaning, given by its reference, and any number of implementations.

    The first argument of every op is the tensor whose device decides which implementation runs.
    """

    def __init__(self, reference: Callable[P, R]) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.__doc__ = reference.__doc__
        self.implementations: dict[str, list[Implementation[P, R]]] = {}
        self._chosen: dict[str, Callable[P, R]] = {}
        # Names of those that were left out when one was chosen, and must not be called by others.
        self.excluded: frozenset[str] = frozenset()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0]
        return self._chosen.get(first.device.type, self.reference)(*args, **kwargs)

    def implementation(
        self, device_type: str, *, name: str, unavailable: Callable[[], str | None] = _always
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register the decorated function for a device type; the last registered is preferred."""

        def register(run: Callable[P, R]) -> Callable[P, R]:
            known = self.implementations.setdefault(device_type, [])
            if name == REFERENCE or any(each.name == name for each in known):
                raise ValueError(f"{self.name} already has an implementation named {name!r}")
            known.append(Implementation(name, run, unavailable))
            return run

        return register

    def select(
        self,
        device_type: str,
        exclude: Collection[str] | Mapping[str, str] = (),
        *,
        tensors_on: str | None = None,
    ) -> Selection:
        """Choose the preferred implementation that can run on the device, and remember it.

        exclude: names of those that are left out, perhaps with the reasons.
        tensors_on: the type of device whose tensors it is for, where that is another: kernels of a
        GPU that are interpreted compute on a CPU.
        """
        place = tensors_on or device_type
        self.excluded = frozenset(exclude)
        passed_over: list[tuple[str, str]] = []
        for candidate in reversed(self.implementations.get(device_type, [])):
            if candidate.name not in exclude:
                reason = candidate.unavailable()
            else:
                reason = exclude[candidate.name] if isinstance(exclude, Mapping) else "excluded"
            if reason is None:
                self._chosen[place] = candidate.run
                return Selection(self.name, candidate.name, tuple(passed_over))
            passed_over.append((candidate.name, reason))
        self._chosen[place] = self.reference
        return Selection(self.name, REFERENCE, tuple(passed_over))


OPS: dict[str, Op[Any, Any]] = {}


def declare(reference: Callable[P, R]) -> Op[P, R]:
    """Declare an op whose meaning is the decorated plain-torch function."""
    op = Op(reference)
    if op.name in OPS:
        raise ValueError(f"op {op.name!r} is declared twice")
    OPS[op.name] = op
    return op


def select(
    device_type: str,
    exclude: Collection[str] = (),
    refused: Mapping[str, Mapping[str, str]] | None = None,
) -> list[Selection]:
    """Choose an implementation of every op for a device type ("cpu", "cuda").

    Implementations named in `exclude` are left out, and those of an op that are in `refused`, which
    has the reasons. Returns one Selection per op, to be shown at start-up: an op that fell back to
    its reference is seen there with the reasons.
    """
    left_out = dict.fromkeys(exclude, "excluded")
    return [
        op.select(device_type, left_out | dict((refused or {}).get(op.name, {})))
        for op in OPS.values()
    ]
