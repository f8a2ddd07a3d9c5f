"""What every test process has in common.

One thread each: `make test` has a process for each of two cores, and threads that wait for one another across
processes make small work many times slower. Set before torch is loaded, and inherited by what a test starts.

Properties are tried on the same examples in every run, so that a failure is there again in the next. New examples, a
different set each time, are drawn with `--hypothesis-profile=explore`.
"""

import os

from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"
settings.register_profile("repeat", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None, print_blob=True)
settings.load_profile("repeat")
