"""Entry points: parse, build, call."""
