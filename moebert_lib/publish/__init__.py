"""What others see: the report, the site, and a model to share."""

from moebert_lib import lazy_files

__getattr__, __dir__ = lazy_files(__name__, __file__)
