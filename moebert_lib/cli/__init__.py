"""The ``moebert`` command: one file for each group of commands.

Each file declares its commands' options beside the functions that run them.
"""
