"""One thread for each test process: `pytest -n 2` has a process for each core, and threads that wait for one another
across processes make small work many times slower. Set before torch is loaded, and inherited by what a test starts."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
