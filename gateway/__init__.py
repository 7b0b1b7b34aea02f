"""The enforcing proxy in front of a clinic's apps. See DESIGN.md."""
