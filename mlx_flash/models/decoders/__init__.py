"""Decoders that mlx-lm lacks, or computes with another activation: one file each."""
