"""``python -m moebert_lib``, which is also the command ``moebert``."""

import sys


def main() -> int:
    """Run the command; Ctrl-C while it is imported ends it with one line too."""
    try:
        from moebert_lib.cli.main import main as run_command

        return run_command()
    except KeyboardInterrupt:
        print("moebert: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
