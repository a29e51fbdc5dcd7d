"""Run notebooks: plan, execute, sweep, status and tables of all runs."""

from moebert_lib import lazy_files

__getattr__, __dir__ = lazy_files(__name__, __file__)
