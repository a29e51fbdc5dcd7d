"""What runs show: statistics, the paper's claims, and verdicts."""

from moebert_lib import lazy_files

__getattr__, __dir__ = lazy_files(__name__, __file__)
