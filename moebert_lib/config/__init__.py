"""Settings and their presets, the paper's numbers, errors, files, and digests of code and data."""
