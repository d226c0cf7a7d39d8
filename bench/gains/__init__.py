"""Finished runs -> frontiers -> compute-equivalent gains with intervals -> the class of each innovation."""

from bench.gains.compute import compute_gains

__all__ = ["compute_gains"]
