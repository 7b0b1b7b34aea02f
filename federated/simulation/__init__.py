"""The same learning and analytics over virtual devices, many at once. See DESIGN.md."""
