"""Trained models in use: loading, judging media, scoring."""
