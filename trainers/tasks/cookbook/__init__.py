"""Recipes: one small task per file, each the same run on any number of ranks and with any ``batch.per_gpu``."""
