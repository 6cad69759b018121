"""Core ML packages of mlx_flash model directories. Nothing is exported yet; see CHANGELOG.md."""
