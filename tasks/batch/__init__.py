"""Batch: options, dataset, staging, plan, batches, score, parts, publish, report, in that order."""
