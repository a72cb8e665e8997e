"""Whether a machine is sound: the checks of `harness doctor`, which the Slurm pre-flight makes on every node too.

    check.py         what one check has found, and how a person reads it
    machine.py       Python, libraries, compiler
    places.py        folders: whether they can be written, what is free, how fast they write
    network.py       the hub, W&B, and whether what a recipe names lies in the cache
    accelerator.py   torch, its GPUs, attention kernels, DeepSpeed's operators, 4-bit: what costs an import of seconds
    examine.py       which of them are made, for a machine or for a recipe, side by side, each within its time

The promise: a check tries the thing itself where that takes less than seconds (a write, a product of matrices, a 4-bit round trip), and a
check that hangs or dies is a failure of that check alone.
"""
