"""The way of a request and its answer, byte for byte: ASGI on one side, HTTP/1.1 on the other. Nothing of plans."""
