"""The volunteer's daemon: leases units, trains them, delivers the deltas, and loses nothing that was finished.

Rules without I/O: `lifecycle` (a finished unit on its way), `backoff`, `leases` (does a lease follow the public rule?).
Edges: `client` (gRPC), `web` and `cache` (public files), `spool` (disk), `trainer` (torch). `daemon` joins them.
Only outbound connections are made, and nothing but signed endpoints of the run is asked.
"""
