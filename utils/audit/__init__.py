"""What audit.py does with scores: p-values, the verdict, and the reports; imports no torch."""
