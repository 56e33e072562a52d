"""What somebody who only wants the weights sees over HTTP."""

import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.integration.live_run import LiveRun, command, environment


def get(url: str, **headers: str) -> tuple[int, bytes, str]:
    """Fetch a URL; return status, body and cache-control."""
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status, reply.read(), reply.headers.get("cache-control", "")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), ""


def test_the_front_page_tells_how_to_fetch_and_what_was_fetched_verifies(served: LiveRun, folder: Path) -> None:
    status, page, _ = get(served.public_url + "/")
    assert status == 200
    assert f"{served.public_url}/latest.txt" in page.decode()
    addresses = get(f"{served.public_url}/latest.txt")[1].decode().split()
    assert len(addresses) > 5
    for address in addresses:
        path = folder / address.removeprefix(served.public_url + "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(get(address)[1])
    done = subprocess.run(
        command("checkpoint", "verify", str(folder / "checkpoints" / "000000"), "--run", str(served.join.run)),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_files_come_in_parts_and_what_never_changes_may_be_kept(served: LiveRun) -> None:
    weights = f"{served.public_url}/checkpoints/000000/transformer/diffusion_pytorch_model.safetensors"
    whole = get(weights)
    assert "immutable" in whole[2]
    assert get(weights, Range="bytes=100-199")[:2] == (206, whole[1][100:200])
    assert get(f"{served.public_url}/latest.json")[2] == "no-cache"


@pytest.mark.parametrize(
    "path", ["/../run.toml", "/%2e%2e/keys/coordinator.pem", "/checkpoints/.making-000001/x", "/nothing", "/deltas/"]
)
def test_what_is_not_public_is_not_there(served: LiveRun, path: str) -> None:
    assert get(served.public_url + path)[0] == 404
