"""Zero-shot classification: what `python evaluate.py zeroshot` does (Table 4).

Each finding of a dataset is a yes/no question (questions.py), all questions of an image in one
forward. An image's score for a finding is log P(yes) - log P(no).
"""

import functools
from statistics import fmean

import student
from evaluation import datasets, questions, results, students, tables
from evaluation.tables import ZERO_SHOT
from metrics import scores
from runtime import ranks


def add_arguments(parser):
    """Adds the flags of this command."""
    parser.add_argument("--open_i", help="folder of Open-I: ecgen-radiology/*.xml and the PNGs")
    parser.add_argument("--chestx_ray14", help="folder of ChestX-ray14: test_list.txt, "
                        "Data_Entry_2017*.csv and the images")
    parser.add_argument("--chexpert", help="folder of CheXpert, the one that holds valid/ or test/")
    parser.add_argument("--chexpert_labels", help="its label file (default: the first below it of "
                        "groundtruth.csv, test_labels.csv, valid.csv)")
    parser.add_argument("--views", choices=("max", "mean"), default="max",
                        help="CheXpert: one score of a study's views (default: %(default)s)")
    parser.add_argument("--chestx_det10", help="folder of ChestX-Det10: test.json and the images")
    students.add_arguments(parser)


def benchmarks(args):
    """The datasets that the flags name, with their images.

    Returns ([datasets.Benchmark], a sentence for each dataset that is not there). Raises ValueError
    where no dataset has an image.
    """
    chexpert = functools.partial(datasets.chexpert, labels=args.chexpert_labels)
    benches, absent = [], []
    for folder, read in ((args.open_i, datasets.open_i),
                         (args.chestx_ray14, datasets.chestx_ray14),
                         (args.chexpert, chexpert),
                         (args.chestx_det10, datasets.chestx_det10)):
        if folder:
            try:
                benches.append(datasets.with_images(read(folder)))
            except FileNotFoundError as error:
                absent.append(str(error))
    if not any(bench.studies for bench in benches):
        why = absent + [f"{bench.name}: {what}" for bench in benches for what in bench.missing[:3]]
        raise ValueError("; ".join(why) or "expected some of --open_i, --chestx_ray14, --chexpert, "
                         "--chestx_det10")
    return benches, absent


def run(args):
    """Asks the students about the datasets, and prints Table 4 with their AUCs.

    args  flags
    Returns {student: {dataset: what `aucs` returns}}. Raises ValueError where no dataset has an
    image.
    """
    folders = students.named(args.student)
    benches, missing = benchmarks(args)
    before, settings, parts = results.begin(args, folders.values(), benches)
    if before:
        return results.end(args, before, known=True)
    rows, lines = {name: {} for name in folders}, []
    for at, (name, path) in enumerate(folders.items()):
        model = student.load(path, args.bf16, ranks.init())
        for bench in benches:
            title = f"{name}, {bench.name}"
            folder = parts and parts / str(at) / bench.name
            odds = log_odds(model, path, bench, args, title, folder)
            if odds:
                rows[name][bench.name] = aucs(bench, odds, args.views)
                lines += tables.auc_lines(title, rows[name][bench.name])
    missing += [f"{bench.name}: {what}" for bench in benches for what in bench.missing]
    lines += [f"{bench.name}: {note}" for bench in benches for note in bench.notes]
    figures = {name: [row.get(dataset, {}).get("macro") for dataset in ZERO_SHOT]
               for name, row in rows.items()}
    lines.append(tables.beside(4, figures))
    return results.end(args, {"settings": settings, "rows": rows, "missing": missing,
                              "table": "\n".join(lines)})


def log_odds(model, path, bench, args, title, parts):
    """One student's scores on one dataset, {study id: {finding: log P(yes) - log P(no)}}. Images
    that cannot be read leave bench.studies and are named in bench.missing."""
    failed, processor = {}, student.Processor(path, bench.task, bench.images, args.max_pixels)
    logps = questions.ask(model, processor, bench.studies, questions.closed_questions(bench.task),
                          parts, args.num_workers, failed, title)
    bench.studies = [study for study in bench.studies if study.id in logps]
    bench.missing += [f"{key}: {why}" for key, why in failed.items()]
    return {key: {finding: options["yes"] - options["no"] for finding, options in answer.items()}
            for key, answer in logps.items()}


def aucs(bench, odds, views="max"):
    """The areas under the ROC curves of one student on one dataset.

    bench  datasets.Benchmark; an image without a label does not count for its class. Where its
           studies have a record with "group" (CheXpert), that is what the images are views of
    odds   {study id: {finding: log P(yes) - log P(no)}}
    views  max or mean: one score of a group's images
    Returns {"n": images, "macro": the mean AUC over bench.headline, "classes", "left_out": how many
    of these have an AUC and have none, "auc": {finding: AUC or None}, "labels", "positive":
    {finding: how many}}; with groups also "per_study": the macro with one score a group, "studies":
    how many, "views".
    """
    findings = bench.task.findings
    images = [(study.labels, odds[study.id]) for study in bench.studies]
    labels, predicted = by_finding(images, findings)
    macro = headline_auc(bench, images)
    figures = {"n": len(bench.studies), "macro": macro.value,
               "classes": len(macro.per_class) - macro.left_out, "left_out": macro.left_out,
               "auc": scores.macro_auc(labels, predicted).per_class,
               "labels": {finding: len(values) for finding, values in labels.items()},
               "positive": {finding: sum(values) for finding, values in labels.items()}}
    groups = {}
    for study in bench.studies:
        if study.record:
            groups.setdefault(study.record["group"], []).append(study)
    if groups:
        pool = max if views == "max" else fmean
        pooled = [(group[0].labels, {finding: pool(odds[study.id][finding] for study in group)
                                     for finding in findings}) for group in groups.values()]
        figures |= {"per_study": headline_auc(bench, pooled).value, "studies": len(groups),
                    "views": views}
    return figures


def headline_auc(bench, units):
    """scores.macro_auc over bench.headline; units: [(labels, scores)] of each image or group."""
    return scores.macro_auc(*by_finding(units, bench.headline))


def by_finding(units, findings):
    """[(labels, scores)] -> {finding: labels}, {finding: scores}, each over the units that have the
    finding's label; a finding that none has is missing."""
    labels, predicted = {}, {}
    for finding in findings:
        labelled = [(given, scored) for given, scored in units if finding in given]
        if labelled:
            labels[finding] = [given[finding] for given, _ in labelled]
            predicted[finding] = [scored[finding] for _, scored in labelled]
    return labels, predicted
