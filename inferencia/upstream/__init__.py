"""The way to an engine: the client side of HTTP/1.1 that answers are relayed through.

``pool.Upstream.send`` writes one request to an ``Origin`` and returns its ``Answer`` as
soon as the head is there; body bytes then go straight from the socket's callback to the
``Sink`` that the caller attached: no task, no queue and no copy in between, which is
what makes relaying cheap.

What an answer means, which headers pass and what is tried next is decided elsewhere.
"""
