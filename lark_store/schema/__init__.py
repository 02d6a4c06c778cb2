"""What is stored: the catalog, the vector tables, files of factors, locks, and the open database.

`backends` has where it is stored.
"""
