"""Slurm: from a cluster file and a recipe to jobs that survive what a cluster does to them.

schema.py       the cluster file: what a site has and what a job of it asks for
secrets.py      what no file of a run may hold: KEY=VALUE lines that their owner alone can read
slurm.py        the only module that starts Slurm's commands
render.py       job.sbatch and the commands inside it: pure text, for a person to read at night
submission.py   what is checked, made and sent for a run; array.py for many of them; pipeline.py and chain.py for stages
allocation.py   what the batch script becomes: pre-flight, data, lives, and what follows them
own_job.py      whether Slurm takes its job, and what it asks of Slurm for it
decision.py     what follows when a life has ended
node.py         the shim on each node
preflight.py    whether every node can do its part; probe.py, space.py and findings.py are its parts
dependency.py   who waits for whom, when a successor takes a run over
status.py       how runs stand
"""
