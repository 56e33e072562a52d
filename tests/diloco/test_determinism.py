import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from diloco.determinism import GOLDEN, selftest, selftest_digest, set_precision
from protocol.errors import SelfTestFailed
from tests.diloco import golden


def test_this_machine_passes_the_self_test() -> None:
    selftest()
    assert selftest_digest() == GOLDEN


def test_a_machine_that_flushes_subnormals_fails_the_self_test() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        with pytest.raises(SelfTestFailed, match="golden merge"):
            selftest()
    finally:
        torch.set_flush_denormal(False)


def test_canonical_digests_are_the_recorded_ones() -> None:
    assert golden.digests() == golden.recorded()


def numpy_features_to_disable() -> str:
    """Everything that numpy would otherwise choose at run time on this processor."""
    module = np._core._multiarray_umath  # type: ignore[attr-defined]
    return " ".join(name for name in module.__cpu_dispatch__ if module.__cpu_features__.get(name))


@pytest.mark.parametrize(
    ("capability", "plain_numpy", "threads"), [("default", True, 1), ("avx2", False, 2), ("avx2", True, 2)]
)
def test_canonical_digests_do_not_depend_on_the_processor_or_on_threads(
    capability: str, plain_numpy: bool, threads: int
) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    if plain_numpy:
        environment["NPY_DISABLE_CPU_FEATURES"] = numpy_features_to_disable()
    command = [sys.executable, "-m", "tests.diloco.golden", "--threads", str(threads)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(run.stdout) == golden.recorded()


def test_precision_is_set_for_the_process_and_reported() -> None:
    threads = torch.get_num_threads()
    try:
        report = set_precision("cpu", 2)
        assert torch.get_num_threads() == report.threads == 2
        assert torch.get_float32_matmul_precision() == "highest"
        assert report.bitwise_repeatable
    finally:
        torch.set_num_threads(threads)
    assert not set_precision("cuda", threads).bitwise_repeatable
