"""Bytes into exchanges and back: the ways into and out of the core."""
