"""The tamper-evident log: written before the answer leaves, verifiable by outsiders. See DESIGN.md."""
