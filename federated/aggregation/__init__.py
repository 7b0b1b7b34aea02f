"""Secure aggregation with distributed noise: bytes in, bytes out, no I/O. See DESIGN.md."""
