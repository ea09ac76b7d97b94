"""The groups of settings of a recipe, one module each."""
