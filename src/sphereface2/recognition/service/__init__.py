"""Recognition over HTTP: a REST service and its web page, in one process.

Where things are:

- ``server``: binding, keys, signals, draining. TLS and slow clients are a proxy's work.
- ``app``: puts the parts together into an ASGI application.
- ``routes``, ``people``: the endpoints; ``state``: what they work with.
- ``schemas``, ``bodies``: what the API takes and gives; how a request is read.
- ``recogniser``, ``batching``: images to embeddings; many requests in one forward pass.
- ``security``, ``keys``: who may ask, from where, how much and how often.
- ``observer``, ``metrics``, ``audit``: what is recorded of each request.
- ``static/``: the page, served as it is.
"""
