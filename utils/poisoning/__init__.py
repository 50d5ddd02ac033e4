"""What attacks share; attacker.py says what an attacker may use."""
