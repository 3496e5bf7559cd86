"""Modules of Equiformer (V1), on features of e3nn's irreps, in the layout of so3/irreps.py."""
