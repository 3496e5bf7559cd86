"""Geometry of SO(3): coefficient layouts, edge frames, Wigner matrices and sphere grids."""
