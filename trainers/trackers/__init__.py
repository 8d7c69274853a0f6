"""Send the lines of metrics.jsonl to trackers, each from a process of its own. Torch-free."""
