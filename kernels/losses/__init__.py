"""Training losses; each file holds one."""
