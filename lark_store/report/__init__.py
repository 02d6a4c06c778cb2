"""Reports: one self-contained HTML page with tables, charts and a picker of queries. No store, no network.

page       render the page, and write it; base.html.jinja, page.css and page.js are its parts
sheets     tables for readers
queries    the data of the picker
"""
