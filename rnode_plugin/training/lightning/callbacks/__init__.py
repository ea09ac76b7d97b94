"""Callbacks of Lightning's Trainer, each usable alone."""
