"""What every rank runs. `harness run` starts it through accelerate; each of these does as well:

accelerate launch --config_file configs/backends/zero2.yaml --num_processes 2 launch/train.py --recipe RECIPE [key=value ...]
torchrun --nproc_per_node 2 launch/train.py --recipe RECIPE
deepspeed launch/train.py --recipe RECIPE
python launch/train.py --recipe RECIPE
"""

import sys

from harness.rank import main

if __name__ == "__main__":
    sys.exit(main())
