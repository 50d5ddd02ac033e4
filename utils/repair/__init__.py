"""What defenses share; defender.py says what a defender may use."""
