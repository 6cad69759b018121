"""Core ML programs: dense and paged decoders, predictors."""
