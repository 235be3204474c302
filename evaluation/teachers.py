"""How far the teachers drift apart: Obs. 1.1, Fig. 1a, Table 2.

    python evaluate.py teachers --studies studies.jsonl [--task_file task.json] [--against report]
           [--encoder FOLDER] [--output teachers.json]

No model is asked; only the texts of a studies.jsonl are read, by data.read_classes. What is
measured, for any task:

precision, recall, F1
    of positive findings, micro over all (study, finding) pairs (Fig. 1a), against the truth: the
    labels, or what the report says, read as the teachers' texts are. A finding that a text or truth
    does not name is negative; the class -1, or one named 'uncertain', counts as --uncertain says.
    Only findings that the truth names in some study count.
similarity
    to the report: cosine of TF-IDF vectors (the words' idf from the reports), or of mean hidden
    states (--encoder).
words, refused, unread
    mean length of a text; share of texts that decline and find nothing; share of texts that do not
    decline and in which nothing could be read. A teacher of which no text was read has none of the
    other figures, and counts for none.
accuracy
    per finding, Table 2: the class that is read equals the truth's, over the studies whose truth
    names the finding and for which the teacher gave a text (evaluate.py classify counts a missing
    one as wrong); what cannot be read is wrong. 'mean 5' is over the paper's five findings, 'mean
    all' and the "mean" of the JSON over the task's.
gap
    accuracy of the best teacher less that of the worst.
kappa
    Cohen's, between two teachers: per finding over the studies that both answered, where not naming
    the finding is a class of its own; mean over the findings where it is defined.
dependence of errors
    Eq. 3-4 take the teachers for independent. Let e_u = 1 where teacher u's class is not the
    truth's, over the (study, finding) pairs for which all teachers gave a text. The pairs are in
    strata s: a finding; or a finding and its true class, since a teacher that misses whatever is
    severe depends on others that do so only through the truth.

    phi_uv    correlation of e_u and e_v, each less its mean in the stratum
    ratio     observed / expected number of pairs that all teachers get wrong; and that most, more
              than half, do; expected = sum_s n_s P(k wrong), k Poisson-binomial of the rates
              mean_s(e_u): 1 under independence
    interval  95%, percentiles over bootstrap samples of whole studies, as the findings of a study
              depend on each other

Shapes: N teachers, U studies, S strata, P pairs of study and finding.
"""

import contextlib
import functools
import itertools
import json
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

import data
from evaluation.tables import FIVE, TABLE_2, cell, five_first, means_of, paper_cells, short
from metrics.scores import cohen_kappa
from metrics.text import tf_idf
from runtime import flags, ranks
from runtime.records import require_folder, write_text

OF_THE_PAPER = {name.lower(): figures for name, figures in TABLE_2.items() if name != "Ours"}
UNCERTAIN = (-1, "uncertain")


# ----------------------------------------------------------------------------------- what was said

def readings(studies, names, task, num_workers=0):
    """What the teachers' texts say.

    studies      list of data.Study
    names        the teachers
    task         data.Task
    num_workers  processes that read beside this one
    Returns {teacher: [{finding: class} of each study, None where it gave no text]}.
    """
    texts = [study.trajectories[name] for name in names for study in studies
             if name in study.trajectories]
    read = functools.partial(data.read_classes, task=task)
    with ProcessPoolExecutor(num_workers) if num_workers else contextlib.nullcontext() as pool:
        said = pool.map(read, texts, chunksize=64) if pool else map(read, texts)
        bar = tqdm(said, total=len(texts), desc="reading", delay=2, disable=ranks.rank() > 0)
        said = iter(list(bar))
    return {name: [next(said) if name in study.trajectories else None for study in studies]
            for name in names}


def truths(studies, task, against):
    """What is true of each study.

    studies  list of data.Study
    task     data.Task
    against  'labels', or 'report': what the report says
    Returns [{finding: class} of each study, None without any label or a report].
    """
    if against == "labels":
        return [study.labels or None for study in studies]
    return [data.read_classes(study.report, task) if study.report else None for study in studies]


# --------------------------------------------------------------------------------- each by itself

def precision_recall(read, truth, task, uncertain="negative"):
    """Precision, recall and F1 of one teacher's positive findings; see the docstring of this file.

    read       [{finding: class} or None] of each study
    truth      the same of the truth
    task       data.Task
    uncertain  'negative', 'positive' or 'ignore' (pairs with an uncertain side are left out)
    Returns {"precision", "recall", "f1": None where undefined, "tp", "fp", "fn"}.
    """
    tp = fp = fn = 0
    findings = [finding for finding in task.findings if any(t and finding in t for t in truth)]
    positive = {*task.positive, *(UNCERTAIN if uncertain == "positive" else ())}
    for guess, true in zip(read, truth):
        if guess is None or true is None:
            continue
        for finding in findings:
            said, fact = guess.get(finding), true.get(finding)
            if uncertain == "ignore" and (said in UNCERTAIN or fact in UNCERTAIN):
                continue
            tp += said in positive and fact in positive
            fp += said in positive and fact not in positive
            fn += said not in positive and fact in positive
    return {"precision": tp / (tp + fp) if tp + fp else None,
            "recall": tp / (tp + fn) if tp + fn else None,
            "f1": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None,
            "tp": tp, "fp": fp, "fn": fn}


def accuracy(read, truth, task):
    """How often one teacher's class is the truth's.

    read, truth  [{finding: class} or None] of each study
    task         data.Task
    Returns {finding: share of the truths that the text's class equals}, {finding: how many}.
    """
    share, n = {}, {}
    for finding in task.findings:
        right = [guess.get(finding) == true[finding] for guess, true in zip(read, truth)
                 if guess is not None and true and finding in true]
        if right:
            share[finding], n[finding] = sum(right) / len(right), len(right)
    return share, n


def words(text):
    """The words of a text, in lower case."""
    return re.findall(r"\w+", text.lower())


def mean(values):
    """The mean of numbers; None if there are none."""
    return sum(values) / len(values) if values else None


def encode(texts, folder, batch_size=16):
    """Vectors of texts: last hidden states of a text encoder, averaged over a text's tokens.

    texts       n texts
    folder      folder or hub id of the encoder; safetensors, no remote code
    batch_size  texts per forward
    Returns (n, hidden size) float32, unit vectors, and how many texts were cut at the encoder's
    length.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModel.from_pretrained(folder, trust_remote_code=False, use_safetensors=True,
                                      dtype=torch.float32).eval()
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    most = getattr(model.config, "max_position_embeddings", 512)
    limit = min(tokenizer.model_max_length, most)
    device = ranks.init()
    model.to(device)
    vectors, cut = [], 0
    for start in range(0, len(texts), batch_size):
        part = texts[start:start + batch_size]
        cut += sum(len(ids) > limit for ids in tokenizer(part, verbose=False)["input_ids"])
        batch = tokenizer(part, padding=True, truncation=True, max_length=limit,
                          return_tensors="pt").to(device)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with torch.no_grad():
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        seen = mask[:, :, None]
        averaged = (hidden * seen).sum(1) / seen.sum(1)
        vectors.append(torch.nn.functional.normalize(averaged, dim=1).cpu().numpy())
    return np.concatenate(vectors), cut


def similarities(studies, names, encoder=None):
    """How similar the teachers' texts are to the reports.

    studies  list of data.Study
    names    the teachers
    encoder  folder or hub id of a text encoder; None: TF-IDF
    Returns {teacher: mean cosine of its texts to the reports, None where no study has both}, and in
    words what was measured.
    """
    studies = [study for study in studies if study.report and study.report.strip()]
    if not studies:
        return dict.fromkeys(names), "none, no study has a report"
    if encoder is None:
        cosines = tf_idf_cosines(studies, names)
        kind = f"cosine of TF-IDF vectors, idf from {len(studies)} reports"
    else:
        cosines, cut = encoder_cosines(studies, names, encoder)
        kind = f"cosine of the mean hidden states of {encoder}, {cut} texts cut at its length"
    return {name: mean(values) for name, values in cosines.items()}, kind


def tf_idf_cosines(studies, names):
    """{teacher: [cosine of each of its texts to the report]}, the words' idf from the reports."""
    vector = tf_idf([study.report for study in studies])
    reports = [vector(study.report) for study in studies]
    cosines = {name: [] for name in names}
    for name in names:
        for study, report in zip(studies, reports):
            if name in study.trajectories:
                said = vector(study.trajectories[name])
                cosine = sum(weight * report.get(word, 0) for word, weight in said.items())
                cosines[name].append(cosine)
    return cosines


def encoder_cosines(studies, names, encoder):
    """{teacher: [cosine of each of its texts to the report]}, and how many texts were cut."""
    reports, cut = encode([study.report for study in studies], encoder)
    cosines = {name: [] for name in names}
    for name in names:
        at = [i for i, study in enumerate(studies) if name in study.trajectories]
        if at:
            vectors, more = encode([studies[i].trajectories[name] for i in at], encoder)
            cosines[name] = (vectors * reports[at]).sum(1).tolist()
            cut += more
    return cosines, cut


# -------------------------------------------------------------------------------- with each other

def kappa(first, second, task):
    """Cohen's kappa of two teachers, the mean over findings.

    first, second  [{finding: class} or None] of each study
    task           data.Task
    Returns the mean; None where kappa is defined for no finding.
    """
    both = [(a, b) for a, b in zip(first, second) if a is not None and b is not None]
    if not both:
        return None
    values = [cohen_kappa([a.get(finding) for a, _ in both], [b.get(finding) for _, b in both])
              for finding in task.findings]
    return mean([value for value in values if value is not None])


def gaps(accuracies):
    """The accuracy of the best teacher less that of the worst.

    accuracies  {teacher: {finding: accuracy}}
    Returns {finding: {"gap", "best", "worst"}} over the teachers that have the finding.
    """
    found = {}
    for finding in dict.fromkeys(f for of_finding in accuracies.values() for f in of_finding):
        of = {name: of_finding[finding] for name, of_finding in accuracies.items()
              if finding in of_finding}
        best, worst = max(of, key=of.get), min(of, key=of.get)
        found[finding] = {"gap": of[best] - of[worst], "best": best, "worst": worst}
    return found


def wrong_counts(rates):
    """The Poisson-binomial distribution of how many of N independent teachers are wrong.

    rates  (..., N) how often each is
    Returns (..., N + 1), the probability of 0 .. N.
    """
    distribution = np.ones((*rates.shape[:-1], 1))
    for u in range(rates.shape[-1]):
        p, none = rates[..., u, None], np.zeros((*rates.shape[:-1], 1))
        right = np.concatenate([distribution * (1 - p), none], -1)
        wrong = np.concatenate([none, distribution * p], -1)
        distribution = right + wrong
    return distribution


def errors_of(read, truth, given):
    """Who is wrong where, over the pairs for which all teachers gave a text.

    read   {teacher: [{finding: class} or None of each study]}
    truth  [{finding: class} or None]
    given  'finding' or 'finding and class': what makes a stratum
    Returns study (P,), stratum (P,), both numbered from 0, and wrong (P, N) 0 or 1.
    """
    strata, study, stratum, wrong = {}, [], [], []
    for i, true in enumerate(truth):
        said = [of_study[i] for of_study in read.values()]
        if not true or None in said:
            continue
        for finding, value in true.items():
            key = finding, value if given == "finding and class" else None
            study.append(i)
            stratum.append(strata.setdefault(key, len(strata)))
            wrong.append([reading.get(finding) != value for reading in said])
    _, study = np.unique(np.array(study, int), return_inverse=True)
    return study, np.array(stratum, int), np.array(wrong, float).reshape(-1, len(read))


def wrong_together(totals, N):
    """How many pairs all teachers, and most of them, get wrong.

    totals  (..., S, N + 3): how many pairs a stratum has, how many of them each teacher, all
            teachers, most teachers get wrong
    N       teachers
    Returns observed and expected under independence (Eq. 3-4), (..., 2) each: all, most.
    """
    n = totals[..., 0]
    distribution = wrong_counts(totals[..., 1:N + 1] / np.maximum(n, 1)[..., None])
    all_wrong = (n * distribution[..., N]).sum(-1)
    most_wrong = (n * distribution[..., N // 2 + 1:].sum(-1)).sum(-1)
    return totals[..., N + 1:].sum(-2), np.stack([all_wrong, most_wrong], -1)


def resampled_ratios(counts, N, samples, seed):
    """Observed / expected of bootstrap samples of whole studies.

    counts  (U, S, N + 3), of each study what `wrong_together` takes of all
    Returns (samples, 2); NaN where nothing is expected.
    """
    U = len(counts)
    rng, ratios = np.random.default_rng(seed), []
    for start in range(0, samples, 50):  # some at a time, for the memory that they take
        times = rng.multinomial(U, np.full(U, 1 / U), size=min(50, samples - start)).astype(float)
        totals = (times @ counts.reshape(U, -1)).reshape(-1, *counts.shape[1:])
        observed, expected = wrong_together(totals, N)
        undefined = np.full_like(observed, np.nan)
        ratios.append(np.divide(observed, expected, out=undefined, where=expected > 0))
    return np.concatenate(ratios)


def correlations(residuals):
    """phi of each two teachers.

    residuals  (P, N) errors less their mean in the stratum
    Returns nested lists (N, N); None where the errors of one of the two do not vary in any stratum.
    """
    N = residuals.shape[1]
    norm = np.sqrt((residuals ** 2).sum(0))
    phi = [[None] * N for _ in range(N)]
    for u in range(N):
        for v in range(N):
            if norm[u] * norm[v] > 1e-9:
                phi[u][v] = float(residuals[:, u] @ residuals[:, v] / (norm[u] * norm[v]))
    return phi


def dependence(read, truth, task, given="finding", samples=1000, seed=0):
    """How the teachers' errors depend on each other; formulas in the docstring of this file.

    read     {teacher: [{finding: class} or None of each study]}
    truth    [{finding: class} or None]
    task     data.Task
    given    'finding' or 'finding and class': what makes a stratum
    samples  bootstrap samples of the studies
    seed     of the bootstrap
    Returns {"given", "pairs": P, "phi": (N, N) nested lists, "all" and "most": {"observed",
    "expected", "ratio", "interval"}}, a figure None where it is undefined; None instead where there
    are fewer than two teachers or no pair.
    """
    N = len(read)
    if N < 2:
        return None
    study, stratum, wrong = errors_of(read, truth, given)                      # (P,), (P,), (P, N)
    P = len(wrong)
    if not P:
        return None
    many = wrong.sum(1)
    columns = np.column_stack([np.ones(P), wrong, many == N, many > N / 2])             # (P, N + 3)
    counts = np.zeros((study.max() + 1, stratum.max() + 1, N + 3))                   # (U, S, N + 3)
    np.add.at(counts, (study, stratum), columns)
    totals = counts.sum(0)                                                              # (S, N + 3)
    observed, expected = wrong_together(totals, N)                            # all, most: (2,) each
    drawn = resampled_ratios(counts, N, samples, seed)                                # (samples, 2)
    residuals = wrong - (totals[:, 1:N + 1] / totals[:, :1])[stratum]
    result = {"given": given, "pairs": P, "phi": correlations(residuals)}
    for k, name in enumerate(("all", "most")):
        known, finite = expected[k] > 0, drawn[np.isfinite(drawn[:, k]), k]
        bounds = np.percentile(finite, [2.5, 97.5]).tolist() if known and len(finite) else None
        result[name] = {"observed": int(observed[k]), "expected": float(expected[k]),
                        "ratio": float(observed[k] / expected[k]) if known else None,
                        "interval": bounds}
    return result


# --------------------------------------------------------------------------------------- the whole

def measure(studies, task, against="labels", uncertain="negative", encoder=None, samples=1000,
            seed=0, num_workers=0):
    """All that is measured: the object that --output writes and --json prints.

    studies      list of data.Study with trajectories
    task         data.Task
    against      'labels' or 'report'; None where there is no truth, then what needs one is None or
                 empty
    uncertain    what an uncertain finding counts as: negative, positive or ignore
    encoder      folder or hub id of a text encoder; None: TF-IDF
    samples      bootstrap samples of the studies
    seed         of the bootstrap
    num_workers  processes that read beside this one
    Returns

    {"against", "uncertain", "studies": how many, "similarity": in words,
     "teachers": {name: {"texts", "precision", "recall", "f1", "tp", "fp", "fn", "similarity",
                         "words", "refused", "unread", "accuracy": {finding: share},
                         "n": {finding: count}, "mean": unweighted over the findings}},
     "gap": {finding: {"gap", "best", "worst"}},
     "kappa": {"names": [N], "matrix": N x N},
     "errors": {"names": of the teachers that were read, "given": [`dependence` of each kind of
                strata]}}
    """
    names = data.teacher_names(studies)
    read = readings(studies, names, task, num_workers)
    heard = {name: said for name, said in read.items() if any(said)}
    truth = truths(studies, task, against) if against else [None] * len(studies)
    similarity, kind = similarities(studies, names, encoder)
    rows = {}
    for name in names:
        texts = [study.trajectories[name] for study in studies if name in study.trajectories]
        said = heard.get(name, [])
        share, n = accuracy(said, truth, task)
        nothing = [reading == {} for reading in read[name] if reading is not None]
        # a text in which something was read does not decline, so it is not read a second time
        declines = [unread and data.is_refusal(text, task) for unread, text in zip(nothing, texts)]
        rows[name] = {"texts": len(texts),
                      **precision_recall(said, truth, task, uncertain),
                      "similarity": similarity[name],
                      "words": mean([len(words(text)) for text in texts]),
                      "refused": mean(declines),
                      "unread": mean([a and not b for a, b in zip(nothing, declines)]),
                      "accuracy": share, "n": n, "mean": mean(share.values())}
    matrix = [[None] * len(names) for _ in names]
    for i, j in itertools.combinations_with_replacement(range(len(names)), 2):
        matrix[i][j] = matrix[j][i] = kappa(heard.get(names[i], []), heard.get(names[j], []), task)
    given = [dependence(heard, truth, task, strata, samples, seed)
             for strata in ("finding", "finding and class")]
    return {"against": against, "uncertain": uncertain, "studies": len(studies), "similarity": kind,
            "teachers": rows,
            "gap": gaps({name: row["accuracy"] for name, row in rows.items()}),
            "kappa": {"names": names, "matrix": matrix},
            "errors": {"names": list(heard), "given": [one for one in given if one]}}


# ---------------------------------------------------------------------------------------- as text

def of_the_paper(name):
    """Our name of a teacher -> its row of Table 2 or None: 'claude-sonnet-4' is 'sonnet-4',
    'GPT-5-nano' is 'gpt-5'."""
    return next((row for row in OF_THE_PAPER if row in name.lower()), None)


def square(names, matrix):
    """The lines of a matrix, with the teachers' names beside it and their numbers above."""
    lines = [f"{'':24}" + "".join(f"{i:>7}" for i in range(1, len(names) + 1))]
    for i, (name, row) in enumerate(zip(names, matrix), 1):
        lines.append(f"{i:>2} {name:21}" + "".join(map(cell, row)))
    return lines


def drift_table(result, task):
    """What `measure` returns, as text; Table 2's figures are below ours.

    result  what `measure` returns
    task    data.Task
    """
    truth = {"labels": "the labels", "report": "the findings of the report",
             None: "no truth: no labels, no reports"}[result["against"]]
    lines = [f"{result['studies']} studies against {truth}; "
             f"uncertain counts as {result['uncertain']}; "
             f"similarity to the report: {result['similarity']}"]
    lines += text_lines(result["teachers"])
    if result["gap"]:
        lines += ["", *accuracy_lines(result["teachers"], result["gap"], task)]
    if len(result["teachers"]) > 1:
        lines += ["", "agreement: Cohen's kappa, mean over findings",
                  *square(result["kappa"]["names"], result["kappa"]["matrix"])]
    for one in result["errors"]["given"]:
        lines += ["", *dependence_lines(one, result["errors"]["names"])]
    return "\n".join(lines)


def text_lines(rows):
    """`drift_table`'s part on the texts: findings, similarity, length, refusals, unread ones."""
    heads = ("texts", "precision", "recall", "F1", "similarity", "words", "refused", "unread")
    lines = [f"{'':24}" + "".join(f"{head:>11}" for head in heads)]
    for name, row in rows.items():
        cells = [cell(row[key], 11) for key in ("precision", "recall", "f1", "similarity")]
        cells += [cell(row["words"], 11, 1), cell(row["refused"], 11), cell(row["unread"], 11)]
        lines.append(f"{name:24}{row['texts']:>11}" + "".join(cells))
    return lines


def accuracy_lines(rows, gap, task):
    """`drift_table`'s part beside Table 2: accuracies, the paper's below each, and the gaps."""
    columns = five_first([finding for finding in task.findings if finding in gap])
    beside_paper = bool(set(columns) & set(FIVE))
    means, notes = means_of(rows.values(), beside_paper)
    width = {head: max(7, len(head) + 1) for head in means}
    lines = [f"{'accuracy':24}" + "".join(f"{short(finding):>7}" for finding in columns)
             + "".join(f"{head:>{width[head]}}" for head in means)]
    ours = {of_the_paper(name) for name in rows}
    absent = [row for row in OF_THE_PAPER if row not in ours] if beside_paper else []
    for name in [*rows, *absent]:
        if name in rows:
            cells = [cell(rows[name]["accuracy"].get(finding)) for finding in columns]
            cells += [cell(of(rows[name]), width[head]) for head, of in means.items()]
            lines.append(f"{name:24}" + "".join(cells))
        else:
            lines.append(f"{name:24}  not run")
        if beside_paper and (row := of_the_paper(name)):
            lines.append(f"{'  paper: ' + row:24}{paper_cells(OF_THE_PAPER[row], columns)}")
    gap_cells = [cell(gap[finding]["gap"]) for finding in columns]
    lines.append(f"{'gap, best - worst':24}" + "".join(gap_cells))
    if beside_paper:
        of_finding = dict(zip(FIVE, zip(*OF_THE_PAPER.values())))
        theirs = {finding: max(values) - min(values) for finding, values in of_finding.items()}
        cells = [cell(theirs.get(finding), digits=2, absent="") for finding in columns]
        lines.append(f"{'  paper':24}" + "".join(cells))
    return lines + notes


def dependence_lines(one, names):
    """`drift_table`'s part on what `dependence` returns."""
    lines = [f"dependence of errors given the {one['given']}, {one['pairs']} pairs of study and "
             "finding (Eq. 3-4: phi 0, ratio 1)"]
    for many in ("all", "most"):
        figures = one[many]
        interval = ""
        if figures["interval"]:
            low, high = figures["interval"]
            interval = f" [{low:.2f}, {high:.2f}]"
        lines.append(f"{many} wrong: {figures['observed']}, "
                     f"{figures['expected']:.1f} if independent, "
                     f"ratio {cell(figures['ratio'], 0, 2)}{interval}")
    return lines + square(names, one["phi"])


# ------------------------------------------------------------------------------------ the command

def add_arguments(parser):
    """Adds the flags of `evaluate.py teachers`."""
    parser.add_argument("--studies", required=True, help="studies.jsonl with trajectories")
    parser.add_argument("--task_file", help="task.json; without it MIMIC-CXR's 14 findings")
    parser.add_argument("--split", help="only these studies (default: all)")
    parser.add_argument("--teachers", help="NAME,...: only these teachers (default: all)")
    parser.add_argument("--against", choices=("labels", "report"),
                        help="the truth (default: labels where there are any, else the reports)")
    parser.add_argument("--uncertain", choices=("negative", "positive", "ignore"),
                        default="negative", help="what an uncertain finding counts as in precision "
                        "and recall (default: %(default)s)")
    parser.add_argument("--encoder", help="folder or hub id of a text encoder for the similarity "
                        "(default: TF-IDF)")
    parser.add_argument("--samples", type=int, default=1000,
                        help="bootstrap samples of the studies (default: %(default)s)")
    parser.add_argument("--seed", type=flags.a_seed, default=0,
                        help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--num_workers", type=flags.at_least_zero, default=0,
                        help="processes that read the texts (default: %(default)s, this one)")
    parser.add_argument("--output", help="teachers.json to write")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args):
    """Measures the teachers of a studies.jsonl and prints the tables.

    args  flags
    Returns what `measure` returns. Raises ValueError for bad input, where no study has
    trajectories, or none has what --against names.
    """
    if args.samples < 1:
        raise ValueError(f"--samples {args.samples}: expected at least 1")
    if args.output:
        require_folder(args.output)
    task = data.load_task(args.task_file)
    studies = data.read_studies(args.studies, task, args.split)
    if not data.keep_teachers(studies, args.teachers):
        raise ValueError(f"{args.studies}: no study has trajectories, expected the teachers' texts")
    there = {"labels": any(study.labels for study in studies),
             "report": any(study.report for study in studies)}
    if args.against and not there[args.against]:
        raise ValueError(f"{args.studies}: no study has {args.against}, "
                         f"expected some for --against {args.against}")
    against = args.against or next((kind for kind, is_there in there.items() if is_there), None)
    result = measure(studies, task, against, args.uncertain, args.encoder, args.samples, args.seed,
                     args.num_workers)
    ranks.print_once(drift_table(result, task))
    if args.output:
        text = json.dumps(result, indent=1) + "\n"
        ranks.on_rank_zero(lambda: write_text(Path(args.output), text))
    if args.json:
        ranks.print_once(json.dumps(result))
    return result
