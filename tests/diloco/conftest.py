"""All tests of `diloco` use one torch thread: the machine has few cores, and small models are quickest so."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
# A busy machine is slow; that is not what these tests are about.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
