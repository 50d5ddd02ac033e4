"""What the scripts in analysis/ share before torch is loaded: their options."""
