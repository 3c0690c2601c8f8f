"""The tunnel: machines behind a router dial out, and requests come to them that way."""
