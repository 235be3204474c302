"""Metrics for radiology reports and chat-model answers: `text` (BLEU, ROUGE-L, CIDEr, similarity), `meteor`, `findings` (which of the 14
CheXpert findings a text asserts) and `scores` (accuracy, AUC, intervals). Standard library only; nothing else outside this folder is
imported, so the folder can be copied into another project as it is. `python -m metrics hypotheses references` scores two files.
"""
