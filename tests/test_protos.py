"""Generated protobuf code belongs to the protos in the tree."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_generated_code_is_fresh() -> None:
    spec = importlib.util.spec_from_file_location("generate_protos", ROOT / "protos" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recorded = (ROOT / "swarmtrain" / "v1" / "SHA256SUMS").read_text()
    assert module.sums(ROOT) == recorded, "a proto or its generated code was edited: run `make protos`"


def test_every_proto_has_code_and_every_code_a_proto() -> None:
    protos = {path.stem for path in (ROOT / "protos/swarmtrain/v1").glob("*.proto")}
    modules = {path.stem.removesuffix("_pb2") for path in (ROOT / "swarmtrain/v1").glob("*_pb2.py")}
    assert protos == modules
