"""The server: hands out units, receives claims, settles rounds, merges, publishes."""
