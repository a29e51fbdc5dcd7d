"""The stages of an experiment, each made once: dataset, teacher, scores, experts, student."""

from moebert_lib import lazy_files

__getattr__, __dir__ = lazy_files(__name__, __file__)
