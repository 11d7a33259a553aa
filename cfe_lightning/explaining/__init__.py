"""Explaining a folder: the output folder, its rows and pictures, and what all its images have in common."""
