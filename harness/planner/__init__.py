"""The planner: what a recipe will take, before it is run, from the model's config.json alone; no torch.

    plan_recipe(load("sft/llama3-8b-tools-qlora"), Place(gpus_per_node=1, gpu=parse_gpu("24GiB"))) -> Plan

architecture.py  a model's shapes from config.json, or from the headers of its weights; known.py those that our recipes name
activations.py   what a layer keeps for its backward pass, to the byte
setting.py       what decides how much memory a run takes
states.py        weights, gradients, optimiser, buffers, by backend
memory.py        memory of a GPU by component and moment; host.py of a node, and its disks
flops.py         operations, and what a card can do; hours.py how long, from a throughput that was measured or stated
fit.py           what would make it fit
render.py        the table, and JSON
headers.py       the plan in the header of every recipe in configs/
"""

from harness.planner.gpus import parse_gpu
from harness.planner.plan import Place, Plan, plan_recipe

__all__ = ["Place", "Plan", "parse_gpu", "plan_recipe"]
