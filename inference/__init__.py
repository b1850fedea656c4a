"""Predictions for new images: which files, by whose statistics, and what is written."""
