"""``accelerate launch train.py [--recipe FILE] [key=value ...]``; without a recipe: recipes/shapes.yaml."""

import sys

from detr_accel.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
