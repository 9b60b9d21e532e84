"""Optimizer steps in one kernel."""
