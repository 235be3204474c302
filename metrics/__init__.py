"""Metrics for radiology reports and answers of chat models; the standard library only.

text       BLEU, ROUGE-L, CIDEr, TF-IDF similarity
meteor     METEOR 1.5 without Java
findings   which of the 14 CheXpert findings a text asserts
phrases    which class of which finding a text names, in the words of a task.json
scores     accuracy, AUC, intervals, Cohen's kappa

Nothing outside this folder is imported, so it can be copied into another project as it is.
`python -m metrics hypotheses references` scores two files.
"""
