"""MoEBERT as transformers models: expert layers, encoder families, conversion, faster forward."""

from moebert_lib import lazy_files

__getattr__, __dir__ = lazy_files(__name__, __file__)
