"""How processes find each other: torchrun, mpirun, srun, deepspeed or plain python; and the command line."""

from distflash.launch.world import World, init, shutdown

__all__ = ["World", "init", "shutdown"]
