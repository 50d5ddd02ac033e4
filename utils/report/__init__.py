"""What compare.py does: it reads finished runs and makes tables, figures and a page."""
