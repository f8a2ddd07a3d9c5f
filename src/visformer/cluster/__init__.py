"""More than one machine, by Ray: the server as an application of Ray Serve, labels for millions of images on Ray Data.

Everything that imports `ray` does so within functions; `connect.py` says what to install where it is missing.
"""
