"""The hot functions: tensors in, tensors out, no parameters, no fairchem."""
