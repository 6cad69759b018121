"""Predictors fitted to the neurons of a model."""
