"""`python train.py ...` runs `visformer train ...`."""

import sys

from visformer.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
