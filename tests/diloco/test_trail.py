import hashlib

import pytest

from diloco.trail import Segment, Trail, merkle_root

# Roots of the test vectors that certificate transparency implementations share.
LEAVES = [
    b"",
    b"\x00",
    b"\x10",
    b"\x20\x21",
    b"\x30\x31",
    b"\x40\x41\x42\x43",
    b"\x50\x51\x52\x53\x54\x55\x56\x57",
    bytes(range(0x60, 0x70)),
]
ROOTS = {
    0: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    5: "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
}


@pytest.mark.parametrize("count", list(ROOTS))
def test_roots_are_those_of_certificate_transparency(count: int) -> None:
    assert merkle_root(LEAVES[:count]).hex() == ROOTS[count]


def test_weights_loss_and_order_of_segments_each_change_the_root() -> None:
    a = Segment(weights_digest=hashlib.sha256(b"a").digest(), mean_loss=0.5)
    b = Segment(weights_digest=hashlib.sha256(b"b").digest(), mean_loss=0.5)
    c = Segment(weights_digest=hashlib.sha256(b"a").digest(), mean_loss=0.25)
    trails = [(a, b), (b, a), (c, b), (a,), (a, b, b)]
    assert len({Trail(segments=segments).root for segments in trails}) == len(trails)
