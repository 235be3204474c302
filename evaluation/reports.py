"""Report generation: what `python evaluate.py reports` does (Tables 3 and 7).

The student writes each report greedily. BLEU, ROUGE-L, METEOR and CIDEr compare it with the
reference after both were cleaned; precision, recall and F1 of the positive findings read both as
they were written.
"""

from statistics import fmean

import data
import sampling
import student
from evaluation import datasets, results, students, tables
from evaluation.tables import TEXT_METRICS
from metrics.findings import finding_scores
from metrics.meteor import Meteor
from metrics.text import bleu, cider, clean_r2gen, rouge_l
from runtime import ranks


def add_arguments(parser):
    """Adds the flags of this command."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--annotation", help="R2Gen's annotation.json; --images is the folder of "
                        "its image_path, MIMIC-CXR-JPG's files/")
    source.add_argument("--reports", help="folder of mimic-cxr-reports; --images is MIMIC-CXR-JPG "
                        "with its split and metadata csv")
    source.add_argument("--studies", help='studies.jsonl with "report"')
    parser.add_argument("--images", default=".", help="see above (default: %(default)s)")
    parser.add_argument("--section", choices=("findings", "impression", "both"), default="findings",
                        help="reference of --reports (default: %(default)s)")
    parser.add_argument("--clean", choices=("r2gen", "none"), default="r2gen",
                        help="of both texts before BLEU and the others (default: %(default)s)")
    parser.add_argument("--uncertain", choices=("negative", "positive", "ignore"),
                        default="negative", help="what -1 counts as (default: %(default)s)")
    parser.add_argument("--meteor", help="folder with meteor-1.5.jar and data/paraphrase-en.gz "
                        "(default: that of an installed pycocoevalcap)")
    parser.add_argument("--prompt", choices=("report", "student"), default="report",
                        help="what is asked (default: %(default)s)")
    students.add_arguments(parser)
    students.add_answer_arguments(parser)


def benchmark(args):
    """The studies with references that the flags name, as a datasets.Benchmark."""
    if args.annotation:
        return datasets.annotation(args.annotation, args.images, args.split)
    if args.reports:
        return datasets.mimic_reports(args.reports, args.images, args.split, args.section)
    studies = data.read_studies(args.studies, data.CHEST, args.split)
    with_report = [study for study in studies if study.report]
    return datasets.Benchmark(args.studies, data.CHEST, args.images, with_report)


def run(args):
    """Has reports written and scores them, and prints Tables 3 and 7 with them.

    args  flags
    Returns {student: what `score_reports` returns}. Raises ValueError where no study has both a
    report and a readable image.
    """
    folders = students.named(args.student)
    bench = datasets.with_images(benchmark(args))
    if not bench.studies:
        why = [f"{bench.name}: no study has both a report and its image", *bench.missing[:3]]
        raise ValueError("; ".join(why))
    before, settings, parts = results.begin(args, folders.values(), [bench])
    if before:
        return results.end(args, before, known=True)

    meteor, failed, written = None, {}, {}
    try:
        meteor = Meteor(args.meteor)
    except FileNotFoundError as error:
        bench.missing.append(str(error))
    for at, (name, path) in enumerate(folders.items()):
        written[name] = write(path, bench, args, name, parts and parts / str(at), failed)
    bench.missing += [f"{key}: {why}" for key, why in failed.items()]
    studies = [study for study in bench.studies if study.id not in failed]
    if not studies:
        raise ValueError(f"no image could be read, the first: {next(iter(failed.values()))}")

    references = [study.report for study in studies]
    rows = {}
    for name, text_of in written.items():
        texts = [text_of[study.id] for study in studies]
        rows[name] = score_reports(texts, references, args.clean, meteor, args.uncertain)
    how = (f"{len(studies)} reports; cleaning: {args.clean}, no cut at 99 words, no <unk>; "
           f"findings: of the texts as written, uncertain counts as {args.uncertain}")
    text = "\n".join([*tables.report_lines(rows, how), *bench.notes])
    return results.end(args, {"settings": settings, "rows": rows, "missing": bench.missing,
                              "table": text})


def write(path, bench, args, name, parts, failed):
    """One student's reports, {study id: text}; None for a study that is in `failed`."""
    processor = student.Processor(path, data.CHEST, args.images, args.max_pixels)
    model = student.load(path, args.bf16, ranks.init())
    texts = sampling.answers(
        model, processor, bench.studies, data.CHEST, temperature=0.0, seed=args.seed,
        batch_size=args.batch_size, max_new_tokens=args.max_new_tokens, prompt=args.prompt,
        num_workers=args.num_workers, desc=name, parts=parts, failed=failed)
    return {study.id: text for study, text in zip(bench.studies, texts)}


def score_reports(texts, references, clean, meteor, uncertain):
    """Scores generated reports.

    texts       n reports as they were written
    references  n reports
    clean       'r2gen' cleans both before the text metrics, 'none' takes them as they are
    meteor      metrics.meteor.Meteor, or None: not scored
    uncertain   what a finding of class -1 counts as: negative, positive or ignore
    Returns {metric of Table 3: score, "CIDEr", "findings": what finding_scores returns, "n",
    "words", "reference_words": mean lengths, "example": the first text}.
    """
    cleaned = clean_r2gen if clean == "r2gen" else str
    hypotheses = {str(i): [cleaned(text)] for i, text in enumerate(texts)}
    targets = {str(i): [cleaned(text)] for i, text in enumerate(references)}
    overlaps = (*bleu(hypotheses, targets).corpus, rouge_l(hypotheses, targets).corpus)
    row = dict(zip(TEXT_METRICS, overlaps))
    row["METEOR"] = meteor.score(hypotheses, targets).corpus if meteor else None
    row["CIDEr"] = cider(hypotheses, targets).corpus
    found = [data.read_classes(text, data.CHEST) for text in texts]
    there = [data.read_classes(text, data.CHEST) for text in references]
    row["findings"] = finding_scores(found, there, uncertain)
    return row | {"n": len(texts), "words": mean_words(texts),
                  "reference_words": mean_words(references), "example": texts[0]}


def mean_words(texts):
    """The mean length of texts, in words."""
    return fmean(len(text.split()) for text in texts)
