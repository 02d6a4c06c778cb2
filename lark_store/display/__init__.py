"""Results for people: tables in a terminal, HTML in a notebook, progress bars. Data formats are in `cli/formats.py`."""
