"""Speed of metrics/ beside the oracles, on one core, and how well the findings are read.

Called by `python tests/bench.py metrics`. BLEU, ROUGE-L and CIDEr score random reports of 60 tokens
beside pycocoevalcap. METEOR reads its table for them in a process of its own, whose growth in
memory is measured (Linux), and scores pairs of 45 tokens beside meteor-1.5.jar, both after loading.
What is not installed (the package, its files, Java) is left out, and a line says so.

The findings are read in the same reports and, with --openi FOLDER, in those of Open-I:
NLMCXR_reports.tgz (openi.nlm.nih.gov, CC BY-NC-ND) against openi_gld_std14.csv (examples/ of
ncbi-nlp/NegBio), seven findings.

--json ends with {"text_s", "text_oracle_s", "meteor_table_s", "meteor_table_mb", "meteor_pair_ms",
"meteor_pair_slowest_ms", "meteor_jar_pair_ms", "findings_s", "openi": {"precision", "recall",
"f1"}}, null where not measured; a pair's time is the median.
"""

import contextlib
import csv
import io
import multiprocessing
import random
import re
import shutil
import statistics
import subprocess
import tarfile
import time
import xml.etree.ElementTree
from pathlib import Path

from metrics.findings import finding_scores, read_findings
from metrics.meteor import JAR, Meteor, find_folder
from metrics.text import bleu, cider, rouge_l

# NegBio's findings -> ours
OPENI_NAMES = {"Effusion": "Pleural Effusion", "Atelectasis": "Atelectasis",
               "Cardiomegaly": "Cardiomegaly", "Consolidation": "Consolidation", "Edema": "Edema",
               "Pneumonia": "Pneumonia", "Pneumothorax": "Pneumothorax"}

# Alternatives in braces; a report is some of these sentences.
SENTENCES = """\
{The|} heart {size|} {is|remains|appears} \
{normal|mildly enlarged|moderately increased|within normal limits|stable}.
{Cardiac|Cardiomediastinal|The cardiomediastinal} {silhouette|contours} {is|are} \
{unremarkable|unchanged|enlarged|stable in appearance}.
{There is|There's|One sees} {a|no} {small|large|moderate-sized|tiny} {left|right|bilateral} \
{pleural effusion|effusions}.
{No|There is no} {evidence of|} {pneumothorax|consolidation|pulmonary edema|acute process} \
{is seen|was identified|is noted|}.
{Increased|Increasing|Worsening|New} {bibasilar|left-lower-lobe|right upper lobe} \
{opacity|opacities} {may represent|suggest|are concerning for} {pneumonia|atelectasis|aspiration}.
{Compared with|In comparison to} the {previous|prior|earlier} {study|examination|radiograph} of \
{3/14/2019|Nov. 2|No. 5|yesterday}, \
{little has changed|there has been little change|the findings are similar}.
{The|An} {endotracheal tube|ET tube|right-sided PICC line|nasogastric tube} \
{ends|terminates|tip is} {2.5 cm|3-4 cm|½ inch} above the carina.
{Degenerative changes|Mild degeneration} of the {spine|thoracic spine, e.g. T5-T6,} {is|are} \
{noted|demonstrated|again seen}.
{Findings|Results} {were discussed with|were communicated to|given to} Dr. \
{Smith|Müller|O'Neil} at {3:15 p.m.|15:15|10 a.m.} {by phone|}.
The patient's {lungs|lung volumes} {are|remain} {clear|low|well expanded|hyper-inflated}; \
{that can't be excluded|it isn't new|cannot rule this out}.
{Impression|IMPRESSION|Conclusion}: {“stable”|'unchanged'|improving} \
{vascular congestion|edema} – {mild|moderate|severe} (grade 2/4).
{Sternotomy wires|Surgical clips|Median sternotomy wires} {are|remain} intact{,| and} \
{as before|unchanged} ... {Temp. 38.5 °C|WBC 12,000/µL}.
{We|I} {recommend|suggest|would advise} {follow-up|further evaluation|a repeat examination} \
{in 6-8 weeks|as clinically indicated|soon} !
"""


def random_report(rng, sentences):
    """Sentences with some of their alternatives chosen.

    The same sentences in two calls give two wordings of one report.
    """
    choose = lambda match: rng.choice(match[1].split("|"))
    return " ".join(re.sub("{([^{}]*)}", choose, sentence) for sentence in sentences)


def random_pair(rng, tokens):
    """Two reports of as many blank-separated words about mostly the same."""
    every = SENTENCES.splitlines()
    topics = [rng.choice(every) for _ in range(tokens)]
    other = [topic if rng.random() < 0.7 else rng.choice(every) for topic in topics]
    return [" ".join(random_report(rng, sentences).split()[:tokens])
            for sentences in (topics, other)]


def run_jar(folder, items):
    """The scores that meteor-1.5.jar gives.

    folder  the jar's
    items   [(hypothesis, references)]
    Returns (corpus score, [score of each item], seconds between the first and the last answer).
    """
    command = ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", JAR, "-", "-", "-stdio",
               "-l", "en", "-norm"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL,
                          encoding="utf-8") as jar:

        def ask(*fields):
            print(*fields, sep=" ||| ", file=jar.stdin, flush=True)
            return jar.stdout.readline().strip()

        (hypothesis, references), *others = items
        answers = [ask("SCORE", *references, hypothesis)]
        start = time.perf_counter()
        answers += [ask("SCORE", *references, hypothesis) for hypothesis, references in others]
        seconds = time.perf_counter() - start
        # a score of each item, then that of the corpus
        *scores, total = [float(ask("EVAL", *answers)),
                          *(float(jar.stdout.readline()) for _ in items)]
        jar.stdin.close()
    return total, scores, seconds


def text_seconds(hypotheses, references):
    """Seconds of ours and of pycocoevalcap, None if that is not installed."""
    start = time.perf_counter()
    for metric in (bleu, rouge_l, cider):
        metric(hypotheses, references)
    ours = time.perf_counter() - start
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError:
        return ours, None
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        for metric in (Bleu(4), Rouge(), Cider()):
            metric.compute_score(references, hypotheses)
    return ours, time.perf_counter() - start


def meteor_seconds(folder, texts, pairs):
    """What METEOR takes in this process.

    folder  METEOR's
    texts   for which its table is read
    pairs   [(hypothesis, reference)], which are scored
    Returns (seconds to stream the table, MB that the process grew by, [ms of each pair, the best of
    three runs]).
    """
    # begins a new peak: what the imports took for a while is not counted
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    meteor = Meteor(folder)
    sentences = [meteor.normalise(text) for text in texts]
    start = time.perf_counter()
    paraphrases = meteor.read_paraphrases(sentences)
    seconds, growth = time.perf_counter() - start, peak_memory() - before
    rounds = [[], [], []]
    for times in rounds:
        for hypothesis, reference in pairs:
            start = time.perf_counter()
            meteor.compare(meteor.normalise(hypothesis), meteor.normalise(reference), paraphrases)
            times.append(1000 * (time.perf_counter() - start))
    return seconds, growth, list(map(min, *rounds))


def peak_memory():
    """MB that this process has held at most so far."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def read_openi(folder):
    """[(report, {finding: 0 or 1})] of Open-I, for the findings of OPENI_NAMES."""
    reports = {}
    with tarfile.open(Path(folder, "NLMCXR_reports.tgz")) as tar:
        for member in tar:
            if member.name.endswith(".xml"):
                root = xml.etree.ElementTree.parse(tar.extractfile(member)).getroot()
                parts = {part.get("Label"): part.text
                         for part in root.iter("AbstractText") if part.text}
                sections = [f"{name}: {parts[name]}"
                            for name in ("FINDINGS", "IMPRESSION") if name in parts]
                reports[root.find("uId").get("id")] = "\n\n".join(sections)
    with open(Path(folder, "openi_gld_std14.csv"), newline="", encoding="utf-8") as file:
        return [(reports[row["filename"]],
                 {ours: int(row[theirs]) for theirs, ours in OPENI_NAMES.items()})
                for row in csv.DictReader(file)]


def score_openi(folder):
    """Agreement of read_findings with Open-I's labels; uncertain counts as negative."""
    texts, labels = zip(*read_openi(folder))
    read = [{finding: reading.value for finding, reading in read_findings(text).items()}
            for text in texts]
    scores = finding_scores(read, labels, uncertain="negative", findings=list(OPENI_NAMES.values()))
    print(f"\nfindings in {len(texts)} reports of Open-I, uncertain counts as negative\n"
          f"{'':18} precision  recall      F1")
    rates = "precision", "recall", "f1"
    for name, row in [*scores["per_finding"].items(), ("micro", scores)]:
        cells = ["-" if row[key] is None else f"{row[key]:.3f}" for key in rates]
        print(f"{name:18}", *(f"{cell:>9}" for cell in cells))
    return {key: scores[key] for key in rates}


def add_flags(parser):
    """Adds the flags of `python tests/bench.py metrics` to a parser."""
    parser.add_argument("--reports", type=int, default=3858,
                        help="pairs of reports, as many as MIMIC-CXR's test set has "
                             "(default: %(default)s)")
    parser.add_argument("--meteor", metavar="FOLDER",
                        help="folder with METEOR's jar and data/ "
                             "(default: the installed pycocoevalcap's)")
    parser.add_argument("--openi", metavar="FOLDER",
                        help="folder with NLMCXR_reports.tgz and openi_gld_std14.csv "
                             "(default: left out)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args):
    """Measures, prints and returns the object that --json ends with."""
    rng = random.Random(0)
    reports = [random_pair(rng, 60) for _ in range(args.reports)]
    hypotheses = {i: [hypothesis] for i, (hypothesis, _) in enumerate(reports)}
    references = {i: [reference] for i, (_, reference) in enumerate(reports)}
    report = dict.fromkeys(("text_s", "text_oracle_s", "meteor_table_s", "meteor_table_mb",
                            "meteor_pair_ms", "meteor_pair_slowest_ms", "meteor_jar_pair_ms",
                            "findings_s", "openi"))
    ours, theirs = report["text_s"], report["text_oracle_s"] = text_seconds(hypotheses, references)
    oracle = "is not installed" if theirs is None else f"{theirs:.1f} s"
    print(f"BLEU, ROUGE-L, CIDEr of {args.reports} reports of 60 tokens: {ours:.1f} s "
          f"(at most 30); pycocoevalcap {oracle}", flush=True)
    start = time.perf_counter()
    for hypothesis, _ in reports:
        read_findings(hypothesis)
    report["findings_s"] = time.perf_counter() - start
    print(f"findings of {args.reports} reports of 60 tokens: {report['findings_s']:.1f} s",
          flush=True)
    try:
        folder = find_folder(args.meteor)
    except FileNotFoundError as error:
        print(error)
    else:
        meteor_benchmark(rng, folder, reports, report)
    if args.openi:
        report["openi"] = score_openi(args.openi)
    return report


def meteor_benchmark(rng, folder, reports, report):
    """Measures METEOR and prints the figures.

    rng      random.Random, which makes the pairs
    folder   METEOR's
    reports  pairs of texts, for which the table is read too
    report   the figures are put into this dict
    """
    pairs = [random_pair(rng, 45) for _ in range(200)]
    with multiprocessing.get_context("spawn").Pool(1) as process:
        texts = [text for pair in reports + pairs for text in pair]
        seconds, growth, times = process.apply(meteor_seconds, (folder, texts, pairs))
    report["meteor_table_s"], report["meteor_table_mb"] = seconds, growth
    report["meteor_pair_ms"] = statistics.median(times)
    report["meteor_pair_slowest_ms"] = max(times)
    jar = "the jar needs Java"
    if shutil.which("java"):
        items = [(hypothesis, [reference]) for hypothesis, reference in pairs]
        _, _, jar_seconds = run_jar(folder, items)
        report["meteor_jar_pair_ms"] = 1000 * jar_seconds / (len(pairs) - 1)
        jar = f"the jar {report['meteor_jar_pair_ms']:.1f} ms"
    print(f"METEOR's table for these: {seconds:.1f} s (at most 20), {growth:.0f} MB (at most 200)")
    print(f"METEOR of a pair of 45 tokens: {report['meteor_pair_ms']:.1f} ms, "
          f"the slowest of {len(pairs)} {report['meteor_pair_slowest_ms']:.1f} ms "
          f"(at most 25); {jar}", flush=True)
