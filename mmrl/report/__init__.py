"""The report of a run: one HTML page that holds all its pictures, without scripts or network access."""
