"""Real engines for the end-to-end set: how they are installed and started."""
