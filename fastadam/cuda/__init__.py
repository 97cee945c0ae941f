"""The backend of arrays on a CUDA device."""
