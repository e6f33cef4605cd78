"""What a run would need of a cluster: memory, messages and time of every layout, without starting it."""
