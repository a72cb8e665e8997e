"""What each process of an evaluation runs. `harness evaluate --processes N` starts it; any launcher does as well, on any machines:

accelerate launch --num_processes 8 launch/evaluate.py TARGET --suite NAME=PATH --output DIR
torchrun --nnodes 2 --nproc_per_node 8 … launch/evaluate.py TARGET --suite NAME=PATH --output DIR
"""

import sys

from harness.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
