"""Every system that can be measured, by name."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.systems.base import System
from benchmarks.systems.meshserve_systems import Core, Mesh
from benchmarks.systems.peers import VLLM, LlamaCpp, OpenVINO

OURS = ("core", "mesh", "mesh-unspeculative")
PEERS = ("vllm", "llamacpp-q8_0", "llamacpp-q4_1", "openvino-bf16", "openvino-int8")
GROUPS = {"ours": OURS, "peers": PEERS, "all": OURS + PEERS}


def make_systems(names: Sequence[str], model: str) -> list[System]:
    """The systems of these names and groups, each once.

    Raises:
        ValueError: a name is unknown, or a system cannot be measured here; says what to do.
    """
    known: dict[str, System] = {
        system.name: system
        for system in (
            Core("core", "MeshServe, core alone", model),
            Mesh("mesh", "MeshServe", model),
            # Greedy text of a small model repeats itself, which guessing from what was said before
            # gains much from. No peer guesses by default, so what is left without it is told too.
            Mesh(
                "mesh-unspeculative",
                "MeshServe, speculation off",
                model,
                engine_settings={"speculation": {"method": "off"}},
            ),
            VLLM(),
            LlamaCpp("q8_0"),
            LlamaCpp("q4_1"),
            OpenVINO("bf16"),
            OpenVINO("int8"),
        )
    }
    wanted = dict.fromkeys(name for each in names for name in GROUPS.get(each, (each,)))
    for name in wanted:
        if name not in known:
            raise ValueError(
                f"there is no system {name!r}; there are {', '.join(known)} "
                f"and the groups {', '.join(GROUPS)}"
            )
        lacking = known[name].missing()
        if lacking is not None:
            raise ValueError(f"{name} is {lacking}")
    return [known[name] for name in wanted]
