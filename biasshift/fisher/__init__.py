"""The unit Fisher matrices of one layer, from samples of its incoming activations and errors."""
