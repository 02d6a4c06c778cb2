"""`db check`: `run` has the registry of checks, and there is a module per part of the store.

frozen_store    the state that is checked
findings        what the checks return, with repairs
"""
