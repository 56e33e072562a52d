import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTO = "protocol/wire/coordinator.proto"
GENERATED = ("coordinator_pb2.py", "coordinator_pb2.pyi", "coordinator_pb2_grpc.py", "coordinator_pb2_grpc.pyi")


@pytest.mark.skipif(
    importlib.util.find_spec("grpc_tools") is None,
    reason="grpc_tools is not installed; `pip install -e '.[dev]'` brings the code generator",
)
def test_the_committed_wire_code_is_what_the_generator_makes_of_the_proto_file(tmp_path: Path) -> None:
    # protoc finds its mypy plug-ins on the PATH; they are installed beside this interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "grpc_tools.protoc", "-I", ".", *outputs, PROTO],
        cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in GENERATED:
        made = (tmp_path / "protocol" / "wire" / name).read_text()
        assert made == (ROOT / "protocol" / "wire" / name).read_text(), f"{name} is stale: run `make wire`"
    assert sorted(entry.name for entry in (tmp_path / "protocol" / "wire").iterdir()) == sorted(GENERATED)
