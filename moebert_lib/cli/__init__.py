"""The ``moebert`` command: one file for each group of commands.

Each file declares its commands' options beside the functions that run them.
"""

from moebert_lib import lazy_files

__getattr__, __dir__ = lazy_files(__name__, __file__)
