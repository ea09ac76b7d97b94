"""The flows of images and tables."""
