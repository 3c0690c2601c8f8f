"""How fast the gateway is, beside a plain pass-through proxy, on this machine.

``python -m bench`` from a checkout; see ``README.md`` in this folder.
"""
