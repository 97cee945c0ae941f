"""The arrays that the optimizer keeps of each parameter."""
