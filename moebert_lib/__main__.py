"""``python -m moebert_lib``: the same as the command ``moebert``."""

import sys

from moebert_lib.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
