"""Generate `swarmtrain/v1/*_pb2.py` and `.pyi` (and `_pb2_grpc.py` where a service is declared) from the protos.

Run it by `make protos`, which installs the right protoc. It also writes `swarmtrain/v1/SHA256SUMS`, the digests of its
inputs and outputs: a test compares them, so that an edited proto cannot be committed with old code.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
PACKAGE = Path("swarmtrain/v1")


def sums(root: Path) -> str:
    """Return digests of every proto and of every generated file, in the format of `sha256sum`."""
    generated = [path for path in (root / PACKAGE).glob("*_pb2*") if path.suffix in (".py", ".pyi")]
    sources = (root / "protos" / PACKAGE).glob("*.proto")
    names = sorted(path.relative_to(root).as_posix() for path in [*sources, *generated])
    return "".join(f"{hashlib.sha256((root / name).read_bytes()).hexdigest()}  {name}\n" for name in names)


def main() -> int:
    from grpc_tools import protoc

    for old in (ROOT / PACKAGE).glob("*_pb2*"):
        if old.is_file():
            old.unlink()
    include = Path(protoc.__file__).parent / "_proto"
    for source in sorted((PROTOS / PACKAGE).glob("*.proto")):
        arguments = ["protoc", f"--proto_path={PROTOS}", f"--proto_path={include}"]
        arguments += [f"--python_out={ROOT}", f"--pyi_out={ROOT}"]
        if re.search(r"^service ", source.read_text(), re.MULTILINE):
            arguments.append(f"--grpc_python_out={ROOT}")
        if code := protoc.main([*arguments, source.relative_to(PROTOS).as_posix()]):
            return code
    (ROOT / PACKAGE / "SHA256SUMS").write_text(sums(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
