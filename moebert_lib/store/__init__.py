"""Stored results: the store, committed results, and what a run writes."""

from moebert_lib import lazy_files

__getattr__, __dir__ = lazy_files(__name__, __file__)
