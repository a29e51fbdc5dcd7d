"""Settings and their presets, the paper's numbers, errors, files, and digests of code and data."""

from moebert_lib import lazy_files

__getattr__, __dir__ = lazy_files(__name__, __file__)
