"""Batch programs on Ray: one module a job, each run with `python -m jobs.NAME`."""
