"""The same learning over virtual devices, many at once. See DESIGN.md."""
