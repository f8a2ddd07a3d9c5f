"""`python validate.py ...` runs `visformer validate ...`."""

import sys

from visformer.cli import main

if __name__ == "__main__":
    sys.exit(main(["validate", *sys.argv[1:]]))
