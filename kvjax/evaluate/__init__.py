"""What a cache loses and what it saves: tasks, metrics and the bytes of live caches. `scripts/evaluate.py` runs it."""
