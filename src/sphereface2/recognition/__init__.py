"""A trained network in use: embed, decide, search, export, serve."""
