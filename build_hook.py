"""What an installation generates and compiles: the stubs of the contracts and the CPU kernels.

Hatchling runs the hook for wheels and for editable installs alike.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path("services/engine/core/kernels/cpu")


class BuildHook(BuildHookInterface[Any]):
    """Hatchling's entry: generate before the files of the wheel are collected."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add what is generated to the files of the distribution."""
        root = Path(self.root)
        generated = _load(root / "build_stubs.py").generate_stubs(root)
        if self.target_name == "wheel":
            generated += self._compile_kernels(root, build_data)
        build_data["artifacts"] += [f"/{path.relative_to(root)}" for path in generated]

    def _compile_kernels(self, root: Path, build_data: dict[str, Any]) -> list[Path]:
        if os.environ.get("MESHSERVE_ENGINE__CPU_KERNELS") == "off":
            self.app.display_info("CPU kernels are not compiled: engine.cpu_kernels is off")
            return []
        sys.path.insert(0, str(root))  # where it finds what it shares
        build = _load(root / KERNELS / "build.py")
        try:
            library: Path = build.build(root / KERNELS)
        except build.BuildError as error:
            # An engine runs without them, and tries again when it starts.
            self.app.display_warning(
                f"CPU kernels are not compiled: {error.problem}; {error.way_out}"
            )
            return []
        # For any Python, but for one kind of machine.
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        return [library]


def _load(path: Path) -> ModuleType:
    """Import a file of the source tree, none of whose packages can be imported yet."""
    spec = importlib.util.spec_from_file_location(f"meshserve_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by its name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
