"""What is searched: names become groups of sketches, their rows, and the queries.

resolve     names to groups and questions
rows        the rows of a question, and the stream of their vectors
where       the condition of `--where`
keys        the groups of rows with the same metadata
coverage    the share of each source that is searched
hints       hints for searches without results
"""
