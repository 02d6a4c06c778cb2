"""What is stored and how it is reached: the catalog, the vector tables, the open database, the records."""
