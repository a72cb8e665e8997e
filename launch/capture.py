"""What each process of a capture runs. `harness capture --processes N` starts it; torchrun does as well:

torchrun --nproc_per_node 8 launch/capture.py RECIPE --backend zero3 [key=value ...]
"""

import sys

from harness.cli import main

if __name__ == "__main__":
    main(["capture", *sys.argv[1:]])
