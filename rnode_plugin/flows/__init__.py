"""Normalizing flows for images and tables."""
