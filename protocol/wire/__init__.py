"""Generated from coordinator.proto by `make wire`; never edited by hand, never imported outside `protocol`."""
