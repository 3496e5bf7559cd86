"""What fairchem sees of this package."""
