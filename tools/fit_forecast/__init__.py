"""Fit the forecast on the benchmark's results, and judge it leave-one-pair-out."""
