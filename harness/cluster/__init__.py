"""Slurm: from a cluster file and a recipe to jobs that survive what a cluster does to them.

schema.py       the cluster file: what a site has and what a job of it asks for
secrets.py      what no file of a run may hold: KEY=VALUE lines that their owner alone can read
render.py       job.sbatch and the commands inside it: pure text, for a person to read at night
slurm.py        the only module that starts Slurm's commands
array.py        a recipe with several values of some settings: one job with an element for each
pipeline.py     stages that need one another, with their recipes; chain.py sends them as jobs that wait for one another
dependency.py   who waits for whom, when a successor takes a run over
"""
