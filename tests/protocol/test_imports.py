import subprocess
import sys

SCRIPT = """
import pkgutil, sys
import protocol
names = [module.name for module in pkgutil.walk_packages(protocol.__path__, "protocol.")]
for name in names:
    __import__(name)
assert "protocol.trust" in names and "protocol.service" in names, names
print(*sorted({"torch", "numpy"} & set(sys.modules)))
"""


def test_protocol_imports_without_torch_or_numpy() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
