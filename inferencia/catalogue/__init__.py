"""Which backends serve a model: from the name in a request to ordered candidates.

One task for each backend asks for its model list, again and again (``watching``); a
machine that is slow or off holds up nobody but itself. What they find is one immutable
``snapshot`` that is swapped whole (``roster``), so resolving a name (``choosing``) is
plain functions that never wait.
"""
