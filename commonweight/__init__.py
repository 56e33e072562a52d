"""The command line and the demo: the only place that sees both sides, or reads the environment."""
