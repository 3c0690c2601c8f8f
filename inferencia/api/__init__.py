"""The HTTP services, one module each."""
