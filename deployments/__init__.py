"""Deployments: functions that return complete configurations, and the demo that runs one on real flights."""
