"""What `run` and `convert.py` do around a method: plans, the evaluation of detectors,
imports and exports; and what `audit.py` does with a model."""
