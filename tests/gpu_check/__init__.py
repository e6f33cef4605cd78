"""Every kernel on the device that is there, against the torch path; `python -m tests.gpu_check` and docs/gpu.md."""
