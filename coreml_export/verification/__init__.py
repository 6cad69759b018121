"""Whether an export computes what MLX computes: an interpreter in numpy, hosts, gates."""
