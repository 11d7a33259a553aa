"""The HTML page of an output folder; needs no torch."""
