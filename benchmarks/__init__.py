"""Measurements of this package against fairchem-core's own EquiformerV2."""
