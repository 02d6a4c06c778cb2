"""The explorer in the browser: client code of the public API. It changes nothing in a store.

server      the socket, the address, the life of the process
guard       hosts, tokens, origins and headers, before any page
app         routes and errors
explorer    what all pages share: the open store and the one background job
scope       the queries, sketcher, method and checkpoint of a page, from its URL
equivalent  the command and the Python line with a page's answer
tables      frames as tables; samples as texts
jobs        questions to a model, in a second process
pages/      a module per page, with its template in templates/
"""

from __future__ import annotations

from lark_store.ui.server import serve

__all__ = ["serve"]
