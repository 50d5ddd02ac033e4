"""The machinery that attacks and defenses share; imports go one way, which tests/test_layers.py states."""
