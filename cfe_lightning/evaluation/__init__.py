"""Comparing explainers: measurements, tables and pages."""
