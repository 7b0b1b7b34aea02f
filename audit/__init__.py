"""The tamper-evident log, written before an answer leaves and verifiable by outsiders.

See DESIGN.md.
"""
