"""How far the teachers drift apart: Obs. 1.1, Fig. 1a, Table 2. No model is asked, only the texts of a studies.jsonl are read.

    python evaluate.py teachers --studies studies.jsonl [--task_file task.json] [--against report] [--encoder FOLDER] [--output teachers.json]

What is measured, for any task (data.read_classes reads the texts):

precision, recall, F1   of positive findings, micro over all (study, finding) pairs (Fig. 1a), against the truth: the labels, or what the report
                        says, read as the teachers' texts are. A finding that a text or truth does not name is negative; the class -1, or one
                        named 'uncertain', counts as --uncertain says. Only findings that the truth names in some study count
similarity              to the report: cosine of TF-IDF vectors (the words' idf from the reports), or of mean hidden states (--encoder)
words, refused          mean length of a text; share of texts that decline and find nothing
accuracy                per finding, Table 2: the class that is read equals the truth's, over the studies whose truth names the finding and for
                        which the teacher gave a text (evaluate.py classify counts a missing one as wrong); what cannot be read is wrong.
                        'mean 5' is over the paper's five findings, 'mean all' and the "mean" of the JSON over the task's
gap                     accuracy of the best teacher less that of the worst
kappa                   Cohen's, between two teachers: per finding over the studies that both answered, not naming it being a class of its
                        own; mean over the findings where it is defined
dependence of errors    Eq. 3-4 take the teachers for independent. With e_u = 1 where teacher u's class is not the truth's, over the (study, finding)
                        pairs for which all teachers gave a text, in strata s (a finding; or a finding and its true class, since a teacher
                        that misses whatever is severe depends on others that do so only through the truth):

                            phi_uv   correlation of e_u and e_v, each less its mean in the stratum
                            ratio    observed / expected number of pairs that all teachers get wrong; and that most, more than half, do;
                                     expected = sum_s n_s P(k wrong), k Poisson-binomial of the rates mean_s(e_u): 1 under independence
                            interval 95%, percentiles over bootstrap samples of whole studies, as the findings of a study depend on each other
"""

import contextlib
import functools
import json
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
from evaluation.tables import FIVE, SHORT, TABLE_2, cell, five_first, means_of
from metrics.scores import cohen_kappa
from metrics.text import tf_idf
from runtime import checkpoint, ranks
from runtime.records import require_folder

OF_THE_PAPER = {name.lower(): figures for name, figures in TABLE_2.items() if name != "Ours"}
UNCERTAIN = (-1, "uncertain")


# ------------------------------------------------------------------------------------------------------ what was said

def readings(studies, names, task, num_workers=0):
    """-> {teacher: [{finding: class}, or None without a text, of each study]}. num_workers: processes that read beside this one."""
    texts = [study.trajectories[name] for name in names for study in studies if name in study.trajectories]
    read = functools.partial(data.read_classes, task=task)
    with ProcessPoolExecutor(num_workers) if num_workers else contextlib.nullcontext() as pool:
        said = pool.map(read, texts, chunksize=64) if pool else map(read, texts)
        said = iter(list(tqdm(said, total=len(texts), desc="reading", delay=2, disable=ranks.rank() > 0)))
        return {name: [next(said) if name in study.trajectories else None for study in studies] for name in names}


def truths(studies, task, against):
    """against 'labels' or 'report' -> [{finding: class}, or None without any label or a report, of each study]."""
    if against == "labels":
        return [study.labels or None for study in studies]
    return [data.read_classes(study.report, task) if study.report else None for study in studies]


# -------------------------------------------------------------------------------------------------- each by itself

def precision_recall(read, truth, task, uncertain="negative"):
    """read, truth: [{finding: class} or None]. -> precision, recall, f1 (None where undefined), tp, fp, fn; see the docstring of this
    file. uncertain: 'negative', 'positive' or 'ignore' (pairs with an uncertain side are left out)."""
    tp = fp = fn = 0
    findings = [f for f in task.findings if any(t and f in t for t in truth)]
    for guess, true in zip(read, truth):
        for finding in findings if guess is not None and true is not None else ():
            pair = guess.get(finding), true.get(finding)
            if uncertain == "ignore" and set(pair) & set(UNCERTAIN):
                continue
            said, is_so = (c in task.positive or uncertain == "positive" and c in UNCERTAIN for c in pair)
            tp, fp, fn = tp + (said and is_so), fp + (said and not is_so), fn + (is_so and not said)
    return {"precision": tp / (tp + fp) if tp + fp else None, "recall": tp / (tp + fn) if tp + fn else None,
            "f1": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None, "tp": tp, "fp": fp, "fn": fn}


def accuracy(read, truth, task):
    """-> {finding: share of the truths that the text's class equals}, {finding: how many}."""
    share, n = {}, {}
    for finding in task.findings:
        right = [guess.get(finding) == true[finding] for guess, true in zip(read, truth) if guess is not None and true and finding in true]
        if right:
            share[finding], n[finding] = sum(right) / len(right), len(right)
    return share, n


def words(text):
    return re.findall(r"\w+", text.lower())


def encode(texts, folder, batch_size=16):
    """-> (n, hidden size) float32, unit vectors: last hidden states of a text encoder (folder or hub id; safetensors, no remote code), averaged
    over a text's tokens; and how many texts were cut at the encoder's length."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModel.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, dtype=torch.float32).eval()
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))
    vectors, cut = [], 0
    device = ranks.init()
    model.to(device)
    for start in range(0, len(texts), batch_size):
        part = texts[start:start + batch_size]
        cut += sum(len(ids) > limit for ids in tokenizer(part, verbose=False)["input_ids"])
        batch = tokenizer(part, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(device)
        with torch.no_grad():
            hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        seen = batch["attention_mask"][:, :, None]
        vectors.append(torch.nn.functional.normalize((hidden * seen).sum(1) / seen.sum(1), dim=1).cpu().numpy())
    return np.concatenate(vectors), cut


def similarities(studies, names, encoder=None):
    """-> {teacher: mean cosine of its texts to the reports, None where they never meet}, what was measured in words."""
    studies = [study for study in studies if study.report and study.report.strip()]
    if not studies:
        return dict.fromkeys(names), "none, no study has a report"
    if encoder is None:
        vector = tf_idf([study.report for study in studies])
        reports = [vector(study.report) for study in studies]
        cosines = {name: [sum(weight * report.get(word, 0) for word, weight in vector(study.trajectories[name]).items())
                          for study, report in zip(studies, reports) if name in study.trajectories] for name in names}
        kind = f"cosine of TF-IDF vectors, idf from {len(studies)} reports"
    else:
        reports, cut = encode([study.report for study in studies], encoder)
        cosines = {}
        for name in names:
            at = [i for i, study in enumerate(studies) if name in study.trajectories]
            vectors, more = encode([studies[i].trajectories[name] for i in at], encoder) if at else (np.zeros((0, reports.shape[1])), 0)
            cosines[name], cut = (vectors * reports[at]).sum(1).tolist(), cut + more
        kind = f"cosine of the mean hidden states of {encoder}, {cut} texts cut at its length"
    return {name: sum(values) / len(values) if values else None for name, values in cosines.items()}, kind


# ---------------------------------------------------------------------------------------------- with each other

def kappa(first, second, task):
    """first, second: readings of two teachers -> mean over findings of Cohen's kappa; None where it is defined for none."""
    both = [(a, b) for a, b in zip(first, second) if a is not None and b is not None]
    values = [cohen_kappa([a.get(f) for a, _ in both], [b.get(f) for _, b in both]) for f in task.findings] if both else []
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def gaps(table):
    """table: {teacher: {finding: accuracy}} -> {finding: {"gap", "best", "worst"}} over the teachers that have the finding."""
    out = {}
    for finding in dict.fromkeys(f for row in table.values() for f in row):
        of = {name: row[finding] for name, row in table.items() if finding in row}
        best, worst = max(of, key=of.get), min(of, key=of.get)
        out[finding] = {"gap": of[best] - of[worst], "best": best, "worst": worst}
    return out


def wrong_counts(rates):
    """rates (..., N) -> (..., N + 1): the Poisson-binomial distribution of how many of N independent teachers are wrong."""
    out = np.ones((*rates.shape[:-1], 1))
    for u in range(rates.shape[-1]):
        p, none = rates[..., u, None], np.zeros((*rates.shape[:-1], 1))
        out = np.concatenate([out * (1 - p), none], -1) + np.concatenate([none, out * p], -1)
    return out


def dependence(read, truth, task, given="finding", samples=1000, seed=0):
    """How the teachers' errors depend on each other; formulas in the docstring of this file. given: 'finding' or 'finding and class'.
    -> {"phi": (N, N) nested lists, "pairs": how many (study, finding) pairs, "all" and "most": {"observed", "expected", "ratio",
    "interval"}}; None where fewer than two teachers meet on any pair, a figure None where it is undefined."""
    names, strata, rows = list(read), {}, []  # rows: (study, stratum, [error of each teacher])
    for i, true in enumerate(truth):
        if true and all(read[name][i] is not None for name in names):
            for finding, value in true.items():
                stratum = strata.setdefault((finding, value if given == "finding and class" else None), len(strata))
                rows.append((i, stratum, [read[name][i].get(finding) != value for name in names]))
    if len(names) < 2 or not rows:
        return None
    study, stratum, wrong = (np.array(column) for column in zip(*rows))
    N, wrong = len(names), wrong.astype(float)
    study = np.unique(study, return_inverse=True)[1]

    # per study and stratum: how many pairs, how many of them each teacher, all, most teachers get wrong
    counts = np.zeros((study.max() + 1, len(strata), N + 3))
    many = wrong.sum(1)
    np.add.at(counts, (study, stratum), np.column_stack([np.ones(len(wrong)), wrong, many == N, many > N / 2]))

    def ratios(total):
        """total (..., strata, N + 3) -> observed and expected, (..., 2) each: all, most."""
        n = total[..., 0]
        distribution = wrong_counts(total[..., 1:N + 1] / np.maximum(n, 1)[..., None])
        expected = [(n * distribution[..., list(k)].sum(-1)).sum(-1) for k in ((N,), range(N // 2 + 1, N + 1))]
        return total[..., N + 1:].sum(-2), np.stack(expected, -1)

    total = counts.sum(0)
    observed, expected = ratios(total)
    rng, drawn = np.random.default_rng(seed), []
    for start in range(0, samples, 50):
        times = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=min(50, samples - start)).astype(float)
        seen, due = ratios((times @ counts.reshape(len(counts), -1)).reshape(-1, *total.shape))
        drawn.append(np.divide(seen, due, out=np.full_like(seen, np.nan), where=due > 0))
    drawn = np.concatenate(drawn)

    rest = wrong - (total[:, 1:N + 1] / total[:, :1])[stratum]
    spread = np.sqrt((rest ** 2).sum(0))
    phi = [[float(rest[:, u] @ rest[:, v] / (spread[u] * spread[v])) if spread[u] * spread[v] > 1e-9 else None for v in range(N)] for u in range(N)]
    result = {"given": given, "pairs": len(rows), "phi": phi}
    for k, name in enumerate(("all", "most")):
        finite, known = drawn[np.isfinite(drawn[:, k]), k], expected[k] > 0
        result[name] = {"observed": int(observed[k]), "expected": float(expected[k]), "ratio": float(observed[k] / expected[k]) if known else None,
                        "interval": np.percentile(finite, [2.5, 97.5]).tolist() if known and len(finite) else None}
    return result


# ------------------------------------------------------------------------------------------------------------ the whole

def measure(studies, task, against="labels", uncertain="negative", encoder=None, samples=1000, seed=0, num_workers=0):
    """-> the object that --output writes and --json prints; against None where there is no truth, then what needs one is None or empty:

    {"against", "uncertain", "studies", "similarity": in words,
     "teachers": {name: {"texts", "precision", "recall", "f1", "tp", "fp", "fn", "similarity", "words", "refused",
                         "accuracy": {finding: share}, "n": {finding: count}, "mean": unweighted over the findings}},
     "gap": {finding: {"gap", "best", "worst"}},
     "kappa": {"names": [N], "matrix": N x N}, "errors": {"names": [N], "given": [`dependence` of each kind of strata]}}
    """
    names = data.teacher_names(studies)
    read = readings(studies, names, task, num_workers)
    truth = truths(studies, task, against) if against else [None] * len(studies)
    similarity, kind = similarities(studies, names, encoder)
    rows = {}
    for name in names:
        texts = [study.trajectories[name] for study in studies if name in study.trajectories]
        share, n = accuracy(read[name], truth, task)
        rows[name] = {"texts": len(texts), **precision_recall(read[name], truth, task, uncertain), "similarity": similarity[name],
                      "words": sum(len(words(text)) for text in texts) / len(texts),
                      "refused": sum(data.is_refusal(text, task) for text in texts) / len(texts),
                      "accuracy": share, "n": n, "mean": sum(share.values()) / len(share) if share else None}
    pairs = {(a, b): kappa(read[a], read[b], task) for i, a in enumerate(names) for b in names[i:]}
    matrix = [[pairs.get((a, b), pairs.get((b, a))) for b in names] for a in names]
    given = [dependence(read, truth, task, given, samples, seed) for given in ("finding", "finding and class")]
    return {"against": against, "uncertain": uncertain, "studies": len(studies), "similarity": kind, "teachers": rows,
            "gap": gaps({name: row["accuracy"] for name, row in rows.items()}), "kappa": {"names": names, "matrix": matrix},
            "errors": {"names": names, "given": [one for one in given if one]}}


def of_the_paper(name):
    """Our name of a teacher -> its row of Table 2 or None: 'claude-sonnet-4' is 'sonnet-4', 'GPT-5-nano' is 'gpt-5'."""
    return next((row for row in OF_THE_PAPER if row in name.lower()), None)


def square(names, matrix):
    """A matrix with the teachers' names beside it and their numbers above."""
    return [f"{'':24}" + "".join(f"{i:>7}" for i in range(1, len(names) + 1))] + [
        f"{i:>2} {name:21}" + "".join(map(cell, row)) for i, (name, row) in enumerate(zip(names, matrix), 1)]


def table(result, task):
    """The object of `measure` -> text; Table 2's figures stand below ours."""
    rows, against = result["teachers"], {"labels": "the labels", "report": "the findings of the report", None: "no truth: no labels, no reports"}
    lines = [f"{result['studies']} studies against {against[result['against']]}; uncertain counts as {result['uncertain']}; "
             f"similarity to the report: {result['similarity']}",
             f"{'':24}" + "".join(f"{head:>11}" for head in ("texts", "precision", "recall", "F1", "similarity", "words", "refused"))]
    for name, row in rows.items():
        lines.append(f"{name:24}{row['texts']:>11}" + "".join(cell(row[key], 11) for key in ("precision", "recall", "f1", "similarity"))
                     + cell(row["words"], 11, 1) + cell(row["refused"], 11))
    if result["gap"]:
        columns = five_first([f for f in task.findings if f in result["gap"]])
        first = set(columns) & set(FIVE)
        means, notes = means_of(rows.values(), first)
        lines += ["", f"{'accuracy':24}" + "".join(f"{SHORT.get(f, f[:6]):>7}" for f in columns)
                  + "".join(f"{head:>{max(7, len(head) + 1)}}" for head in means)]
        ours = {of_the_paper(name) for name in rows}
        for name in [*rows, *(row for row in OF_THE_PAPER if first and row not in ours)]:
            if name in rows:
                lines.append(f"{name:24}" + "".join(cell(rows[name]["accuracy"].get(f)) for f in columns)
                             + "".join(cell(mean(rows[name]), max(7, len(head) + 1)) for head, mean in means.items()))
            else:
                lines.append(f"{name:24}  not run")
            if first and (row := of_the_paper(name)):
                figures = dict(zip(FIVE, OF_THE_PAPER[row]))
                lines.append(f"{'  paper: ' + row:24}" + "".join(f"{figures[f]:>7.2f}" if f in figures else f"{'':7}" for f in columns)
                             + f"{OF_THE_PAPER[row][-1]:>7.2f}")
        lines.append(f"{'gap, best - worst':24}" + "".join(cell(result["gap"][f]["gap"]) for f in columns))
        if first:
            spread = {f: max(v) - min(v) for f, v in zip(FIVE, zip(*OF_THE_PAPER.values()))}
            lines.append(f"{'  paper':24}" + "".join(f"{spread[f]:>7.2f}" if f in spread else f"{'':7}" for f in columns))
        lines += notes
    if len(rows) > 1:
        lines += ["", "agreement: Cohen's kappa, mean over findings", *square(result["kappa"]["names"], result["kappa"]["matrix"])]
    for one in result["errors"]["given"]:
        lines += ["", f"dependence of errors given the {one['given']}, {one['pairs']} pairs of study and finding (Eq. 3-4: phi 0, ratio 1)"]
        for many in ("all", "most"):
            r = one[many]
            interval = " [{:.2f}, {:.2f}]".format(*r["interval"]) if r["interval"] else ""
            lines.append(f"{many} wrong: {r['observed']}, {r['expected']:.1f} if independent, ratio {cell(r['ratio'], 0, 2)}{interval}")
        lines += square(result["errors"]["names"], one["phi"])
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ the command

def add_arguments(parser):
    parser.add_argument("--studies", required=True, help="studies.jsonl with trajectories")
    parser.add_argument("--task_file", help="task.json; without it MIMIC-CXR's 14 findings")
    parser.add_argument("--split", help="only these studies (default: all)")
    parser.add_argument("--teachers", help="NAME,...: only these teachers (default: all)")
    parser.add_argument("--against", choices=("labels", "report"), help="the truth (default: labels where there are any, else the reports)")
    parser.add_argument("--uncertain", choices=("negative", "positive", "ignore"), default="negative",
                        help="what an uncertain finding counts as in precision and recall (default: %(default)s)")
    parser.add_argument("--encoder", help="folder or hub id of a text encoder for the similarity (default: TF-IDF)")
    parser.add_argument("--samples", type=int, default=1000, help="bootstrap samples of the studies (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read the texts (default: %(default)s, this one)")
    parser.add_argument("--output", help="teachers.json to write")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args):
    """-> the object of `measure`; prints the tables."""
    if args.samples < 1:
        raise ValueError(f"--samples {args.samples}: expected at least 1")
    if args.output:
        require_folder(args.output)
    task = data.load_task(args.task_file)
    studies = data.read_studies(args.studies, task, args.split)
    if not data.keep_teachers(studies, args.teachers):
        raise ValueError(f"{args.studies}: no study has trajectories, expected the teachers' texts")
    there = {"labels": any(study.labels for study in studies), "report": any(study.report for study in studies)}
    if args.against and not there[args.against]:
        raise ValueError(f"{args.studies}: no study has {args.against}, expected some for --against {args.against}")
    against = args.against or next((kind for kind, is_there in there.items() if is_there), None)
    result = measure(studies, task, against, args.uncertain, args.encoder, args.samples, args.seed, args.num_workers)
    ranks.say(table(result, task))
    if args.output:
        ranks.on_rank_zero(lambda: checkpoint.write_text(Path(args.output), json.dumps(result, indent=1) + "\n"))
    if args.json:
        ranks.say(json.dumps(result))
    return result
