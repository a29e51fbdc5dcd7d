"""Tasks and their examples: where they come from, how they become batches, SQuAD's answers."""

from moebert_lib import lazy_files

__getattr__, __dir__ = lazy_files(__name__, __file__)
