"""How flows run: the decorator of ad-hoc calls, task runners, interruption, workers that join a run."""
