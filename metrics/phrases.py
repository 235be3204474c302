"""The reader of a task's phrases: which class of which finding a text names.

    compiled = compile_phrases({"Holes": ["holes"]},
                               {"none": ["no {finding}"], "many": ["many {finding}"]})
    read_phrases("Many holes.", compiled)     -> {"Holes": "many"}

The words are those that a task.json lists. A phrase is words, {finding} for any of the finding's
words, and * for up to four words of the same clause that name no other finding.
"""

import re

BETWEEN = r"[^\w.;|]+"  # a phrase does not reach over the end of a clause


def compile_phrases(findings, classes):
    """Compiles a task's phrases.

    findings  {finding: [words that name it]}
    classes   {class: [phrases]}
    Returns [(finding, class, compiled expression)], findings and classes in their order.
    """
    compiled = []
    for finding, words in findings.items():
        others = [word for name, names in findings.items() if name != finding for word in names]
        named = "(?:" + "|".join(whole_word(word, others) for word in words) + ")"
        another = "|".join(map(re.escape, others)) or "(?!)"
        gap = rf"(?:{BETWEEN}(?!(?:{another})\b)\w+){{0,4}}?"
        for value, phrases in classes.items():
            for phrase in phrases:
                expression = ""
                for token in phrase.split():
                    if token == "*":
                        expression += gap
                    else:
                        expression += BETWEEN if expression else ""
                        expression += named if token == "{finding}" else re.escape(token)
                compiled.append((finding, value, re.compile(rf"\b{expression}\b", re.IGNORECASE)))
    return compiled


def whole_word(word, others):
    """The expression of a finding's word, not found inside another finding's word.

    word    "effusion"
    others  the words of the other findings: ["pericardial effusion"]
    Returns the source of a regular expression, here r"(?<!pericardial\\ )effusion".
    """
    before = "".join(rf"(?<!{re.escape(other[:-len(word)])})"
                     for other in others if other.endswith(f" {word}"))
    after = "".join(rf"(?!{re.escape(other[len(word):])}\b)"
                    for other in others if other.startswith(f"{word} "))
    return before + re.escape(word) + after


def read_phrases(text, compiled):
    """What a text says of the findings.

    text      str of any length
    compiled  what `compile_phrases` returns
    Returns {finding: class}; of several mentions the earliest counts, and of those that start at
    the same place the shortest. A finding without a mention is missing.
    """
    first = {}
    for finding, value, expression in compiled:
        if match := expression.search(text):
            mention = match.span(), value
            first[finding] = min(first.get(finding, mention), mention)
    return {finding: value for finding, (_, value) in first.items()}
