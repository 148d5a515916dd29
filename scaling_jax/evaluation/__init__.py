"""Losses and errors of a trained model, with intervals."""
