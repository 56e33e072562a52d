"""The names of the files of a prepared data set."""

from typing import Final

MANIFEST: Final = "dataset.json"
HELDOUT: Final = "heldout.safetensors"
CURATOR: Final = "curator.pub"
REPORT: Final = "report.json"
SKIPPED: Final = "skipped.jsonl"
WORK: Final = ".preparing"
