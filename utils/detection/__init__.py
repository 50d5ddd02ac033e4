"""What detectors share; inspector.py says what a detector may see and returns."""
