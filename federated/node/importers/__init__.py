"""Importers: what other programs export, as readings of the daily table.

Each module reads one format, streaming, and yields `Reading`s and `BadRow`s (`importers.reading`).
`importers.run` folds them and puts them into the store, all or nothing.
"""
