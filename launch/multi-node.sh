#!/usr/bin/env bash
# Several machines without Slurm: run this once on every machine, with the variables that torchrun's users know.
#
#   on the first machine:   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 launch/multi-node.sh RECIPE --backend zero3 --processes 8
#   on the second:          NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 launch/multi-node.sh RECIPE --backend zero3 --processes 8
#
# --processes counts the ranks of one machine. The run folder (output_dir) must lie on a file system that all machines see.
set -euo pipefail
: "${NNODES:?set NNODES to the number of machines}"
: "${NODE_RANK:?set NODE_RANK to the number of this machine, from 0}"
: "${MASTER_ADDR:?set MASTER_ADDR to an address of machine 0 that the others reach}"
: "${MASTER_PORT:?set MASTER_PORT to a port that is free on machine 0}"
exec "${PYTHON:-python}" -m harness run "$@"
