"""What evaluate.py measures with: datasets, questions, teachers, tables."""
