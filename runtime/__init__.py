"""Machinery that a reader of the paper may skip."""
