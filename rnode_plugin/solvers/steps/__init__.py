"""Runge-Kutta tableaus, one step of the augmented system, and the size of the next one."""
