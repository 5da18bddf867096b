"""Runs of several processes against the same run of one."""
