"""Machines that may vanish: their notices, what a drain finishes, and which machines are bought under a deadline."""
