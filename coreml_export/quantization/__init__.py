"""Weights in int8, int4 and palettes, rounded by what the layers' inputs are."""
