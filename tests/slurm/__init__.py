"""A package, so that its conftest.py, rig.py and test files may be named as others in tests/ are: `from slurm.rig import Rig`."""
