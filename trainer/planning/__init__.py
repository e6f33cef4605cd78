"""Planning: the memory, messages and time that each layout of a run needs on a cluster, without starting it."""
