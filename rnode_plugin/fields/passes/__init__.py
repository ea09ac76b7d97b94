"""Passes over a prepared stack with a backward by hand: the velocity, its product with the Jacobian, directions."""
