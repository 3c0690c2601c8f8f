"""One shape of answer into another. Pure: no sockets, no clocks."""
