"""Modules with parameters. Their names and order are those of fairchem's ``equiformer_v2``."""
