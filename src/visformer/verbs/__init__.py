"""What the command line can do: one module for each verb, with an options dataclass, a function and `run`.

The function (`validate(options)`) does the work and returns its result; `run(options)` also prints it and returns the
exit code. Nothing is imported here, so that `visformer --help` stays instant.
"""
