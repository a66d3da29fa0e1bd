"""Runs as batch jobs: submitted, looked after, started again."""
