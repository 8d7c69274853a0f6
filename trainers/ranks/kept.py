"""What must not be let go of before the process ends: all that gloo's threads may still want. Torch-free.

torch 2.13's gloo hangs where it is destroyed (pytorch #190489: its destructor waits, holding the interpreter's lock,
for threads that need it). For the same reason every worker leaves by ``os._exit``.
"""

KEPT: list[object] = []
