"""Studies that test papers' claims in our own runs (`spiketrain bench NAME`). docs/results.md has the figures."""
