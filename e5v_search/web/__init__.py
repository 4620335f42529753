"""A collection over HTTP: an API and a page (`server`), and the same answers for this machine's own commands (`client`).

Nothing is imported here: `client` is what a fresh `search` process loads, and it must be light.
"""
