"""What the notebooks teach with: checks of equalities that a reader runs, and exercises."""

from moebert_lib import lazy_files

__getattr__, __dir__ = lazy_files(__name__, __file__)
