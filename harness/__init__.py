"""Harness: from a base model to a reliable tool-calling agent, and from a large agent to a small one.

One strict recipe and one command train with TRL, Accelerate, DeepSpeed, PEFT and bitsandbytes; the code here is what those libraries lack.
Importing this package is free: nothing heavy is loaded before a command needs it.
"""

__version__ = "0.1.0"
