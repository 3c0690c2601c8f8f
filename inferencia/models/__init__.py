"""Models on this machine: found, started, swapped and stopped."""
