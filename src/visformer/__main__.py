"""`python -m visformer` is the command `visformer`."""

import sys

from visformer.cli import main

if __name__ == "__main__":  # data-loading processes import this file too
    sys.exit(main())
