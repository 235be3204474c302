"""Do the teachers drift along the stream of studies? Sec. 2.1, Def. 2.2 and Eq. 2 as a measurement.

    python tools/drift.py --studies studies.jsonl [--task_file task.json] [--order_by KEY]
        [--window 500] [--output drift.json]
    python tools/drift.py --studies studies.jsonl --images files --student runs/spd/student
                                                                  also on the student's log-probs

What is compared. Without --window, at each position all studies before it against all from it on,
as Def. 2.2 has it: P_{0,i} != P_{i+1,inf}. With --window W, the W studies before it against the W
from it on, as Eq. 2 has it: P_i != P_{i+1}.

On what. Each text is read (data.read_classes). Where there are labels, x_f = [finding f is read
wrongly], less its mean over all studies with the same label of f: the teacher's errors given the
truth, so that a label that becomes more frequent is not taken for a teacher that changes. Without
labels, x_f = one 0/1 column for each class that is read, less its mean: then a change of the
patients looks like one of the teachers. With --student, one column more, 'log-prob': its
log pi(t^u | v, l) per token.

The statistic. A teacher may err as often as before and yet on other films, which shows only in
which errors come together. So two-sample differences are taken of x_f ('alone') and of all products
x_f x_g ('with others'), which is an MMD with a quadratic kernel, and for the teachers jointly of
all products x_f^u x_f^v. Each is scaled to variance 1 over the stream, and with m_a, m_b the means
of the two sides of n_a and n_b studies

    T = mean over the features of a group of  n_a n_b / (n_a + n_b) (m_a - m_b)^2

which is about chi-square / df, if nothing changes. The groups are

    for each teacher and finding f: x_f; and all x_f x_g of the other findings g
    jointly, for each finding f: all pairs of teachers
    jointly, for each teacher: all pairs with it and all findings

Cube roots of T (nearly normal: Wilson and Hilferty 1931), less their mean and over their standard
deviation among the permutations, put groups and positions on one scale; a stream's statistic at a
position is the largest of its groups.

p-values. The studies are permuted, texts and labels of a study together, and the largest statistic
over all positions, groups and teachers is recorded: p = the share of orders, the real one among
them, in which it reaches the observed value. So every p is corrected for all positions, findings
and teachers at once, and a stationary stream raises any alarm at all with probability `alpha` at
most, exactly, if its studies come in random order. What breaks that: studies of one patient in a
row; and, less, labels whose shares change while the variance of a teacher's errors depends on the
label (three shares turning from .7, .2, .1 to .1, .2, .7 halfway in the scale model's world
'class', 80 studies: 15 of 150 streams alarm at .05; the same with stationary labels: 11).

What texts alone cannot show: a change that leaves the joint distribution of all texts and labels as
it was, such as every teacher of the scale model turning by pi, so that each errs on the opposite
films. That takes the films, which --student sees, as well as the student knows the teachers' errors
on them: the scale model's does not know them well enough (800 studies, change at 400: no alarm).

drift.json, for tools/report.py (the last line of --json is the same object on one line):

    {"windows": [250, ...]          positions: how many studies come before
     "ids": ["s5...", ...]          the study at each position
     "threshold": 4.1               a statistic above it is an alarm at level alpha
     "alpha", "permutations", "studies", "on", "compared", "order_by"
     "teachers": {name: {
         "statistic": [one per position], "p": 0.002, "alarm": true,
         "where": 2500, "id": "s5...",   the position of the largest statistic; null without alarm
         "finding": "Edema",             the finding that it comes from; null without an alarm
         "findings": {finding: {"statistic": its largest, "p", "alarm", "where",
                                "how": "alone" or "with others"}}}}
     "joint": the same, and "teachers": {name: {"statistic", "p", "alarm", "where", "how"}}, whose
              relation to the others changed; null where there is one teacher}

Shapes: N teachers, n studies in the stream's order, K columns of a finding, D features.
"""

import argparse
import contextlib
import functools
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/ is no package of its own

import apo  # noqa: E402
import data  # noqa: E402
import student  # noqa: E402
from evaluation import teachers  # noqa: E402
from runtime import flags, ranks  # noqa: E402
from runtime.records import require_folder, write_text  # noqa: E402

CHUNK = 25  # permutations whose sums are taken in one matrix product


# -------------------------------------------------------------------------------------- the stream

def ordered(studies, key, path):
    """The studies in the order of record[key]; equal ones in the file's order.

    studies  [data.Study]
    key      of a number or of a text that all records have
    path     their file, for the message of an error
    Raises ValueError naming a study that has neither, or has the other one.
    """
    for study in studies:
        value = study.record.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError(f"{path}: study {study.id!r} has {key!r}: {value!r}, expected a "
                             "number or a text to order by")
        if isinstance(value, str) != isinstance(studies[0].record[key], str):
            raise ValueError(f"{path}: {key!r} is a text in one of the studies {studies[0].id!r} "
                             f"and {study.id!r} and a number in the other, expected one of them in "
                             "all")
    return sorted(studies, key=lambda study: study.record[key])


def columns(studies, names, task, on, num_workers=0):
    """What the teachers' texts say, less its mean; see the docstring of this file.

    studies      [data.Study], the stream
    names        the teachers
    task         data.Task
    on           'errors' or 'findings'
    num_workers  processes that read the texts; 0: this one
    Returns {finding: (N, n, K)}, 0, the mean, where there is no text or no label. Findings that
    nobody labels or reads are left out.
    """
    read = teachers.readings(studies, names, task, num_workers).values()
    out = {}
    for finding in task.findings:
        said = [[None if reading is None else reading.get(finding) for reading in row]
                for row in read]
        given = np.array([[reading is not None for reading in row] for row in read])
        if on == "errors":
            truth = [study.labels.get(finding) for study in studies]
            x = errors(said, given, truth)
        else:
            x = indicators(said, given, task.classes)
        if x.any():
            out[finding] = x
    return out


def errors(said, given, truth):
    """Whether each text is wrong on a finding, less the mean over the studies of one true class.

    said   N rows of the n classes that are read, None where none is
    given  (N, n) bool, whether there is a text
    truth  n classes, None where there is no label
    Returns (N, n, 1).
    """
    x = np.zeros((*given.shape, 1))
    for u, row in enumerate(said):
        for label in set(truth) - {None}:
            inside = given[u] & np.array([true == label for true in truth])
            x[u, inside, 0] = [value != label for value, counts in zip(row, inside) if counts]
            if inside.any():
                x[u, inside] -= x[u, inside].mean(0)
    return x


def indicators(said, given, classes):
    """Which class each text has of a finding, less the teacher's mean.

    said, given  as `errors` takes them
    classes      of the task
    Returns (N, n, K), one column for each class that is read in some text.
    """
    kinds = [kind for kind in classes if any(kind in row for row in said)]
    x = np.zeros((*given.shape, len(kinds)))
    for u, row in enumerate(said):
        for k, kind in enumerate(kinds):
            x[u, :, k] = [value == kind for value in row]
        if given[u].any():
            x[u, given[u]] -= x[u, given[u]].mean(0)
    return x


@torch.no_grad()
def log_probs(studies, names, task, args):
    """The student's log pi(t^u | v, l) per token in nats, less the teacher's mean.

    studies  [data.Study]
    names    the teachers
    task     data.Task
    args     the flags of `parse`; with --output, what is computed is kept in OUTPUT.logps.jsonl,
             and the same command goes on from there
    Returns (N, n, 1), 0, the mean, where there is no text.
    """
    device = ranks.init()
    processor = student.Processor(args.student, task, args.images, args.max_pixels,
                                  args.max_tokens)
    kept = Path(f"{args.output}.logps.jsonl") if args.output else None
    key = apo.reference_key(args, task, studies, names)
    known = read_kept(kept, key) if kept and kept.exists() else {}
    batches = [studies[i:i + args.batch_size] for i in range(0, len(studies), args.batch_size)]
    todo = [batch for batch in batches if not all(study.id in known for study in batch)]
    packed = None
    if todo:
        packed = student.PackedStudent(student.load(args.student, args.bf16, device))
    with open(kept or os.devnull, "ab") as file:
        for batch in tqdm(todo, desc="log-probs"):
            examples = [processor(study, data.student_prompt(study, task, args.prompt),
                                  [study.trajectories.get(name) for name in names])
                        for study in batch]
            (inputs,) = student.to_device(device, student.pack(examples, packed.model))
            per_token = (packed(inputs)[0] / inputs["tokens"].clamp(min=1)).tolist()
            for study, row in zip(batch, per_token):
                known[study.id] = [value if name in study.trajectories else None
                                   for name, value in zip(names, row)]
                line = json.dumps({"id": study.id, "key": key, "logps": known[study.id]})
                file.write(f"\n{line}\n".encode())
            file.flush()
    # None becomes NaN
    x = np.array([known[study.id] for study in studies], dtype=np.float64).T[:, :, None]
    return np.nan_to_num(x - np.nanmean(x, 1, keepdims=True))


def read_kept(file, key):
    """What an earlier call has kept, {study id: log-probs}, of the lines that have this key."""
    known = {}
    for line in file.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):  # a line that a kill tore
            record = json.loads(line)
            if record["key"] == key:
                known[record["id"]] = record["logps"]
    return known


# ------------------------------------------------------------------------------------ the features

def scaled(x):
    """(n, D) -> float32 columns of mean 0 and variance 1; constant ones are left out."""
    x = x - x.mean(0)
    deviation = x.std(0)
    varies = deviation > 1e-9
    return (x[:, varies] / deviation[varies]).astype(np.float32)


def products(a, b):
    """(n, J), (n, K) -> (n, J K) scaled products."""
    return scaled((a[:, :, None] * b[:, None, :]).reshape(len(a), a.shape[1] * b.shape[1]))


def own_features(x):
    """The features of one teacher.

    x  {finding: (n, K)}
    Returns (features (n, D), {(finding, 'alone' or 'with others'): indices of features}).
    """
    x = {finding: scaled(column) for finding, column in x.items()}
    parts = {(finding,): column for finding, column in x.items()}
    names = list(x)
    parts |= {(f, g): products(x[f], x[g]) for i, f in enumerate(names) for g in names[i + 1:]}
    return grouped(parts, lambda part: [(finding, "alone" if len(part) == 1 else "with others")
                                        for finding in part])


def joint_features(x, names):
    """The features of the teachers' pairs.

    x      {finding: (N, n, K)}
    names  the teachers
    Returns (features (n, D), {(finding, 'all pairs') or (teacher, 'with the others'): indices of
    features}).
    """
    parts = {}
    for finding, column in x.items():
        column = [scaled(c) for c in column]
        parts |= {(finding, names[u], names[v]): products(column[u], column[v])
                  for u in range(len(names)) for v in range(u + 1, len(names))}

    def groups_of(part):
        """A pair of teachers counts for the finding and for both of them."""
        finding, first, second = part
        return [(finding, "all pairs"), (first, "with the others"), (second, "with the others")]

    return grouped(parts, groups_of)


def grouped(parts, groups_of):
    """Puts features side by side.

    parts      {part: (n, D_part)}
    groups_of  groups_of(part) returns the groups in which the part counts
    Returns (features (n, D), {group: indices of features}).
    """
    groups, at = {}, 0
    for part, block in parts.items():
        for group in groups_of(part) if block.shape[1] else ():
            groups.setdefault(group, []).extend(range(at, at + block.shape[1]))
        at += block.shape[1]
    return np.concatenate(list(parts.values()), 1), groups


# ----------------------------------------------------------------------------------- the statistic

def blocks(n, step, window):
    """The blocks that sums are taken over, and what is compared.

    n       studies in the stream
    step    studies from one position to the next; None: half an even window, a whole odd one, or a
            20th of the stream
    window  studies on each side; None: all of them
    Returns (edges of the blocks in studies, [(left, middle, right)] in blocks, one per position).
    Raises ValueError where nothing can be compared.
    """
    if not step and window:
        step = window // 2 if window % 2 == 0 else window
    elif not step:
        step = max(1, n // 20)
    if window and window % step:
        raise ValueError(f"--window {window} --step {step}: expected a window that is a multiple "
                         "of the step")
    count = n // step
    reach = window // step if window else count
    first, last = (reach, count - reach) if window else (1, count - 1)
    if last < first:
        raise ValueError(f"{n} studies: expected at least {2 * (window or step)} for two windows "
                         f"of {window or step}")
    edges = np.array([*range(0, count * step, step), n])  # the last block takes the remainder
    return edges, [(max(0, b - reach), b, min(count, b + reach)) for b in range(first, last + 1)]


def statistics(features, groups, edges, places, permutations, seed, progress=None):
    """The statistic of every order, position and group; see the docstring of this file.

    features       (n, D), scaled
    groups         {group: indices of features}
    edges, places  what `blocks` returns
    permutations   random orders beside the real one
    seed           of the random orders
    progress       a bar that counts orders; None: none
    Returns (1 + permutations, positions, groups) float64; the first row is the real order.
    """
    n, D = features.shape
    if not groups:  # a teacher whose texts never differ in anything cannot drift
        return np.zeros((1 + permutations, len(places), 1))
    rng = np.random.default_rng(seed)
    left, middle, right = np.array(places).T
    n_a, n_b = edges[middle] - edges[left], edges[right] - edges[middle]
    weight = np.sqrt(n_a * n_b / (n_a + n_b)).astype(np.float32)[:, None]
    member = np.zeros((D, len(groups)), np.float32)
    for g, indices in enumerate(groups.values()):
        member[indices, g] = 1 / len(indices)
    block = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
    out = np.empty((1 + permutations, len(places), len(groups)))
    for start in range(0, 1 + permutations, CHUNK):
        many = min(CHUNK, 1 + permutations - start)
        inside = np.zeros((many, len(edges) - 1, n), np.float32)
        for i in range(many):
            order = block if start + i == 0 else rng.permutation(block)
            inside[i, order, np.arange(n)] = 1
        sums = (inside.reshape(-1, n) @ features).reshape(many, len(edges) - 1, D)
        total = np.concatenate([np.zeros((many, 1, D), np.float32), sums.cumsum(1)], 1)
        before = (total[:, middle] - total[:, left]) / n_a[:, None]
        after = (total[:, right] - total[:, middle]) / n_b[:, None]
        difference = (before - after).astype(np.float32)
        out[start:start + many] = np.square(difference * weight) @ member
        if progress:
            progress.update(many)
    out = np.cbrt(out)
    deviation = out.std(0)
    return (out - out.mean(0)) / np.where(deviation > 0, deviation, 1)


def detect(x, names, step=None, window=None, permutations=500, alpha=0.05, seed=0, ids=None,
           quiet=True):
    """Looks for drift.

    x             {finding: (N, n, K)} of `columns`, the stream in order
    names         the teachers
    step, window  as `blocks` takes them
    permutations  random orders
    alpha         how likely a stationary stream may raise any alarm
    seed          of the random orders
    ids           of the n studies; None: they are not named
    quiet         as tqdm's disable
    Returns the object of drift.json, see the docstring of this file; without "on", "compared" and
    "order_by". Raises ValueError as `blocks` does.
    """
    n = next(iter(x.values())).shape[1]
    edges, places = blocks(n, step, window)
    features = {name: own_features({finding: column[u] for finding, column in x.items()})
                for u, name in enumerate(names)}
    if len(names) > 1:
        features[None] = joint_features(x, names)
    with tqdm(total=len(features) * (1 + permutations), desc="orders", disable=quiet) as progress:
        z = {name: statistics(own, groups, edges, places, permutations, seed, progress)
             for name, (own, groups) in features.items()}
    # over all positions, groups and teachers, of each order
    largest = np.max([statistic.max((1, 2)) for statistic in z.values()], 0)
    positions = [int(edges[middle]) for _, middle, _ in places]
    peak = functools.partial(largest_of, positions=positions, largest=largest, alpha=alpha)
    found, best = {}, {}
    for name, (_, groups) in features.items():
        real = z[name][0]
        best[name] = best_of_each(real, groups, peak)
        found[name] = of_stream(real, {f: best[name][f] for f in x if f in best[name]}, peak, ids)
    joint = None
    if None in found:
        relations = {name: best[None][name] for name in names if name in best[None]}
        joint = {**found[None], "teachers": relations}
    allowed = int(alpha * (1 + permutations) + 1e-9)  # so many orders may reach an alarm
    return {"windows": positions,
            "ids": [ids[at] for at in positions] if ids else None,
            "threshold": float(np.sort(largest)[::-1][allowed]),
            "alpha": alpha, "permutations": permutations, "studies": n,
            "teachers": {name: found[name] for name in names},
            "joint": joint}


def largest_of(values, positions, largest, alpha):
    """The largest value of a statistic over the positions, and how likely it is.

    values     (positions,) of the real order
    positions  how many studies come before each
    largest    (1 + permutations,), the largest statistic of every order
    alpha      level of an alarm
    Returns {"statistic", "p", "alarm", "where"}.
    """
    # sums of one order that are taken in two ways differ in their last bits
    p = float((largest >= values.max() - 1e-4).mean())
    return {"statistic": float(values.max()), "p": p, "alarm": p <= alpha,
            "where": positions[int(values.argmax())]}


def best_of_each(real, groups, peak):
    """The group with the largest statistic of each finding, or of each teacher.

    real    (positions, groups) of the real order
    groups  (finding or teacher, how) of each
    peak    `largest_of`, which takes the values
    Returns {finding or teacher: {"statistic", "p", "alarm", "where", "how"}}.
    """
    best = {}
    for g, (of, how) in enumerate(groups):
        one = {**peak(real[:, g]), "how": how}
        if of not in best or one["statistic"] > best[of]["statistic"]:
            best[of] = one
    return best


def of_stream(real, findings, peak, ids):
    """What drift.json says of a teacher, or of the teachers jointly.

    real      (positions, groups) of the real order
    findings  {finding: what `best_of_each` returns}
    peak      `largest_of`, which takes the values
    ids       of the studies, or None
    """
    statistic = real.max(1)
    whole = peak(statistic)
    at = whole["where"] if whole["alarm"] else None
    finding = max(findings, key=lambda f: findings[f]["statistic"]) if whole["alarm"] else None
    return {**whole, "statistic": statistic.tolist(), "where": at,
            "id": ids[at] if ids and at is not None else None,
            "finding": finding, "findings": findings}


# ------------------------------------------------------------------------------------- the command

def parse(argv=None):
    """The flags of a list of words; None: of the command line. Exits with status 2 where a number
    is out of its range."""
    parser = argparse.ArgumentParser(
        description="Do the teachers drift along the stream of studies? Names which, where, in "
                    "which finding.")
    parser.add_argument(
        "--studies", required=True,
        help="studies.jsonl, in the stream's order")
    parser.add_argument(
        "--task_file",
        help="task.json; without it MIMIC-CXR's 14 findings")
    parser.add_argument(
        "--split",
        help="only these studies (default: all)")
    parser.add_argument(
        "--teachers",
        help="NAME,...: only these teachers (default: all)")
    parser.add_argument(
        "--order_by", metavar="KEY",
        help="order the stream by this number or text of each record (default: the file's order)")
    add_statistic_arguments(parser)
    add_student_arguments(parser)
    parser.add_argument(
        "--output",
        help="drift.json to write; the log-probs are kept beside it")
    parser.add_argument(
        "--json", action="store_true",
        help="end with one line of JSON")
    args = parser.parse_args(argv)
    for name in ("window", "step", "permutations", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    least = 1 / (1 + args.permutations)
    if not least <= args.alpha < 1:
        parser.error(f"--alpha {args.alpha}: expected 1 / (1 + permutations) = {least:.4f} or "
                     "more, and less than 1")
    return args


def add_statistic_arguments(parser):
    """Adds the flags that say what is compared, and how."""
    parser.add_argument(
        "--on", choices=("errors", "findings"),
        help="what of the texts is compared (default: errors where there are labels)")
    parser.add_argument(
        "--window", type=int, metavar="W",
        help="compare W studies with the next W (default: all before with all after)")
    parser.add_argument(
        "--step", type=int,
        help="studies from one position to the next (default: half an even window, or a 20th of "
             "the stream)")
    parser.add_argument(
        "--permutations", type=int, default=500,
        help="random orders of the stream (default: %(default)s)")
    parser.add_argument(
        "--alpha", type=flags.up_to_one, default=0.05,
        help="how likely a stationary stream may raise any alarm (default: %(default)s)")
    parser.add_argument(
        "--seed", type=flags.a_seed, default=0,
        help="of the random orders (default: %(default)s)")
    parser.add_argument(
        "--num_workers", type=flags.at_least_zero, default=0,
        help="processes that read the texts (default: %(default)s, this one)")


def add_student_arguments(parser):
    """Adds the flags of the student's log-probs."""
    g = parser.add_argument_group("the student's log-probs")
    g.add_argument(
        "--student",
        help="folder or hub id of a Qwen2.5-VL, or the folder of a LoRA adapter on one")
    g.add_argument(
        "--images", default=".",
        help="folder that the image paths are relative to (default: %(default)s)")
    g.add_argument(
        "--prompt", choices=("student", "teacher"), default="student",
        help="teacher: Appendix B's, which names the diagnosis")
    g.add_argument(
        "--max_pixels", type=flags.at_least_one,
        help="pixels per image, 784 make a token (default: 802816, or what the student's folder "
             "allows where that is less)")
    g.add_argument(
        "--max_tokens", type=flags.at_least_one, default=8192,
        help="tokens of a study; longer responses lose their ends (default: %(default)s)")
    g.add_argument(
        "--batch_size", type=int, default=4,
        help="studies per forward (default: %(default)s)")
    g.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
        help="weights in bf16")


def as_text(result):
    """What is printed of the object of drift.json."""
    order = result["order_by"] or "the order of the file"
    lines = [f"{result['studies']} studies by {order}, on {result['on']}; {result['compared']}, "
             f"{len(result['windows'])} positions; {result['permutations']} random orders",
             f"a stationary stream raises any alarm with probability {result['alpha']:g}; "
             f"threshold {result['threshold']:.2f}",
             f"{'':24}{'statistic':>10}{'p':>8}  where"]
    rows = dict(result["teachers"])
    if result["joint"]:
        rows["jointly"] = result["joint"]
    for name, row in rows.items():
        line = f"{name:24}{max(row['statistic']):>10.2f}{row['p']:>8.3f}"
        lines.append(line + alarm_text(row))
    return "\n".join(lines)


def alarm_text(row):
    """What is printed of a stream's alarm; '' where there is none."""
    if not row["alarm"]:
        return ""
    findings = row["findings"]
    line = (f"  DRIFT at study {row['where']} ({row['id']}), {row['finding']} "
            f"{findings[row['finding']]['how']}")
    more = [f for f, one in findings.items() if one["alarm"] and f != row["finding"]]
    line += f"; also {', '.join(more)}" if more else ""
    changed = {teacher: one["statistic"] for teacher, one in row.get("teachers", {}).items()
               if one["alarm"]}
    line += f"; most of all {max(changed, key=changed.get)} with the others" if changed else ""
    return line


def run(args):
    """Looks for drift, prints what it found and writes args.output.

    args  the flags of `parse`
    Returns the object of drift.json. Raises ValueError where an input is faulty or nothing can be
    compared.
    """
    if args.output:
        require_folder(args.output)
    task = data.load_task(args.task_file)
    studies = data.read_studies(args.studies, task, args.split)
    names = data.keep_teachers(studies, args.teachers)
    if not names:
        raise ValueError(f"{args.studies}: no study has trajectories, expected the teachers' texts")
    if args.order_by:
        studies = ordered(studies, args.order_by, args.studies)
    blocks(len(studies), args.step, args.window)  # raises an error before long work
    if args.student:
        student.require_family(args.student)
    on = args.on or ("errors" if any(study.labels for study in studies) else "findings")
    x = columns(studies, names, task, on, args.num_workers)
    if args.student:
        x["log-prob"] = log_probs(studies, names, task, args)
    if not x:
        expected = ("labels of findings" if on == "errors" else
                    "texts in which findings can be read")
        raise ValueError(f"{args.studies}: the texts never differ in {on}, expected {expected}")
    compared = "all before against all after (Def. 2.2)"
    if args.window:
        compared = f"{args.window} studies against the next {args.window} (Eq. 2)"
    found = detect(x, names, args.step, args.window, args.permutations, args.alpha, args.seed,
                   [study.id for study in studies], quiet=None)
    result = {"on": on + (" and log-prob" if args.student else ""), "compared": compared,
              "order_by": args.order_by, **found}
    print(as_text(result))
    if args.output:
        write_text(Path(args.output), json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
    return result


def main():
    """Runs the command."""
    args = parse()
    try:
        run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"drift: {error}") from None


if __name__ == "__main__":
    main()
