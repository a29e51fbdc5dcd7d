"""Interactive exploration: the explorer of importance, its page, and the notebooks' widgets."""

from moebert_lib import lazy_files

__getattr__, __dir__ = lazy_files(__name__, __file__)
