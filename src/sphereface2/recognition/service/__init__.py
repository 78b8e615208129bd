"""Recognition over HTTP: a REST service and its web page, in one process.

Where things are:

- ``commands``: ``sphereface2 serve`` and ``sphereface2 keys``.
- ``server``: binding, keys, signals, draining.
- ``connections``: how many may be open, and their deadlines.
- ``app``: puts the parts together into an ASGI application.
- ``routes``, ``schemas``, ``bodies``: the API; what it takes and gives; how a request is read.
- ``recogniser``, ``batching``: pictures to embeddings; many requests in one forward pass.
- ``people``: the gallery and the kept crops, as the API sees them.
- ``gate``, ``keys``, ``limits``: who may ask, from where, how much and how often.
- ``observer``, ``metrics``, ``audit``: what is recorded of each request.
- ``static/``: the page, served as it is.
"""
