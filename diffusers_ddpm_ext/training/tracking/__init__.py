"""Metrics, trackers, the monitor, and the printed plan."""
