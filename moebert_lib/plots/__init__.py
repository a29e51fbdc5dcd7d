"""Figures: one file for each subject, and the style they share."""

from moebert_lib import lazy_files

__getattr__, __dir__ = lazy_files(__name__, __file__)
