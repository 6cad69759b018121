"""Rows that are asked for together are written near each other."""
