"""Describe a training run by its global batch, launch it on any hardware, get the same run."""
