"""Measurements against named peers in the same run; none of them gates a test."""
