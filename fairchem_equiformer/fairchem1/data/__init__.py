"""Datasets for fairchem's trainers, given by dotted name as `dataset.train.format`."""
