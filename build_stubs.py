"""Generates the Python stubs of every contract under protos/ at build time.

`build_hook.py` runs it at every install, so the stubs are never committed and never stale after
`pip install`. `python build_stubs.py` does the same by hand (`make stubs`) after a .proto file has
been edited.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent
STUB_SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def generate_stubs(root: Path) -> list[Path]:
    """Compiles protos/**/*.proto into importable modules below `root` and returns their paths.

    The file `protos/meshserve/v1/types.proto` becomes `meshserve/v1/types_pb2.py`: the Python
    package mirrors the protobuf package. Raises RuntimeError when protoc refuses a file.
    """
    import grpc_tools
    from grpc_tools import protoc

    source = root / "protos"
    protos = sorted(str(path.relative_to(source)) for path in source.rglob("*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    # The plugin stands beside the interpreter, which need not be on the PATH.
    search_path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    mypy_plugin = shutil.which("protoc-gen-mypy", path=search_path)
    mypy_grpc_plugin = shutil.which("protoc-gen-mypy_grpc", path=search_path)
    if mypy_plugin is None or mypy_grpc_plugin is None:
        raise RuntimeError("protoc-gen-mypy is missing: pip install mypy-protobuf")
    arguments = [
        "protoc",
        f"--plugin=protoc-gen-mypy={mypy_plugin}",
        f"--plugin=protoc-gen-mypy_grpc={mypy_grpc_plugin}",
        f"--proto_path={source}",
        f"--proto_path={well_known}",
        f"--python_out={root}",
        f"--grpc_python_out={root}",
        f"--mypy_out=quiet:{root}",
        f"--mypy_grpc_out=quiet:{root}",
        *protos,
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError(f"protoc failed on {', '.join(protos)}")
    generated: list[Path] = []
    for proto in protos:
        stem = root / proto.removesuffix(".proto")
        generated += [stem.with_name(stem.name + suffix) for suffix in STUB_SUFFIXES]
    for package in {path.parent for path in generated}:
        marker = package / "__init__.py"
        marker.write_text('"""Generated from protos/ at build time; do not edit."""\n')
        generated.append(marker)
    return [path for path in generated if path.exists()]


if __name__ == "__main__":
    for stub in generate_stubs(ROOT):
        sys.stdout.write(f"{stub.relative_to(ROOT)}\n")
