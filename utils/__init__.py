"""What attacks and defenses share; tests/test_layers.py says which module may import which."""

VERSION = "0.1.0"
