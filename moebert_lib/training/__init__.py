"""Train teachers and students, resume a training, evaluate models and look at their routing."""

from moebert_lib import lazy_files

__getattr__, __dir__ = lazy_files(__name__, __file__)
