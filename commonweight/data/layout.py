"""The names of the files of a prepared data set."""

from typing import Final

MANIFEST: Final = "dataset.json"
HELDOUT: Final = "heldout.safetensors"
CURATOR: Final = "curator.pub"
REPORT: Final = "report.json"
SKIPPED: Final = "skipped.jsonl"
WHEREABOUTS: Final = "pictures.jsonl"
"""Which shard and sample each picture is; for the curator alone."""
WORK: Final = ".preparing"
