"""`python infer.py --image_path IMAGE --ckpt_path CKPT` runs `visformer predict ...`."""

import sys

from visformer.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
