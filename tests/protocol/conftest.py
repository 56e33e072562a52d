"""A busy machine is slow; that is not what these tests are about."""

from hypothesis import settings

settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
