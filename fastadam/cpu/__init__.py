"""The backend of NumPy arrays."""
