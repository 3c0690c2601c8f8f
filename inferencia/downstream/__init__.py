"""The way of clients to us: the server side of HTTP/1.1, under aiohttp's.

``listener.Listener`` opens the sockets; each client's ``connection.Connection`` is
aiohttp's own, with what it leaves out: deadlines, caps and good partings.

What a request means, who may ask and what is answered is decided elsewhere.
"""
