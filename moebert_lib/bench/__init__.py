"""Benchmarks: models timed side by side on one machine."""

from moebert_lib import lazy_files

__getattr__, __dir__ = lazy_files(__name__, __file__)
