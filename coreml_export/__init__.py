"""Core ML packages of a model, its predictor and its rows; ``python -m coreml_export``."""
