"""What an outside auditor must run to get the same bits: streams, inner loop, delta codec, merge, outer step.

Two kinds of code live here. *Canonical* code (tables, streams, codec, packing, merge, patch, sketch, checkpoint) gives
the same bytes on every machine: it uses only separate numpy float32 `+ - * / sqrt max` and integers, never a reduction,
a matmul or a transcendental function. *Training* code (`unit`, `evaluate`) uses torch and agrees across machines within
a tolerance only.
"""

from typing import Final

NUMERICS: Final = 3
"""Changes whenever golden unit or merge bytes change; a run admits workers by this number, not by release."""
