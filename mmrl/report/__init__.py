"""A run becomes one self-contained HTML page."""
