"""Do the teachers drift along the stream of studies? Sec. 2.1, Def. 2.2 and Eq. 2 as a measurement.

    python tools/drift.py --studies studies.jsonl [--task_file task.json] [--order_by KEY] [--window 500] [--output drift.json]
    python tools/drift.py --studies studies.jsonl --images files --student runs/spd/student        also on the student's log-probs

What is compared. Without --window, at each position all studies before it against all from it on, as Def. 2.2 has it:
P_{0,i} != P_{i+1,inf}. With --window W, the W studies before it against the W from it on, as Eq. 2 has it: P_i != P_{i+1}.

On what. Each text is read (data.read_classes). Where there are labels, x_f = [finding f is read wrongly], less its mean over all
studies with the same label of f: the teacher's errors given the truth, so that a label that becomes more frequent is not taken for
a teacher that changes. Without labels, x_f = one 0/1 column for each class that is read, less its mean: then a change of the
patients looks like one of the teachers. With --student, one column more, 'log-prob': its log pi(t^u | v, l) per token.

The statistic. A teacher may err as often as before and yet on other films, which shows only in which errors come together. So
two-sample differences are taken of x_f ('alone') and of all products x_f x_g ('with others'), which is an MMD with a quadratic kernel,
and for the teachers jointly of all products x_f^u x_f^v. Each is scaled to variance 1 over the stream, and with m_a, m_b the means of the
two sides of n_a and n_b studies

    T = mean over the features of a group of  n_a n_b / (n_a + n_b) (m_a - m_b)^2         about chi-square / df, if nothing changes

    groups: for each teacher and finding f, x_f; and all x_f x_g of the other findings g
            jointly, for each finding f, all pairs of teachers; and for each teacher, all pairs with it and all findings

Cube roots of T (nearly normal: Wilson and Hilferty 1931), less their mean and over their standard deviation among the permutations,
put groups and positions on one scale; a stream's statistic at a position is the largest of its groups.

p-values. The studies are permuted, texts and labels of a study together, and the largest statistic over all positions, groups and
teachers is recorded: p = the share of orders, the real one among them, in which it reaches the observed value. So every p is
corrected for all positions, findings and teachers at once, and a stationary stream raises any alarm at all with probability
`alpha` at most, exactly, if its studies come in random order. What breaks that: studies of one patient in a row; and, less, labels whose
shares change while the spread of a teacher's errors depends on the label (three shares turning from .7, .2, .1 to .1, .2, .7 halfway in
the scale model's world 'class', 80 studies: 15 of 150 streams alarm at .05; the same with stationary labels: 11).

What texts alone cannot show: a change that leaves the joint distribution of all texts and labels as it was, such as every teacher of the
scale model turning by pi, so that each errs on the opposite films. That takes the films, which --student sees, as well as the student
knows the teachers' errors on them: the scale model's does not know them well enough (800 studies, change at 400: no alarm).

drift.json, for tools/report.py (the last line of --json is the same object on one line):

    {"windows": [250, ...]          positions: how many studies come before
     "ids": ["s5...", ...]          the study at each position
     "threshold": 4.1               a statistic above it is an alarm at level alpha
     "alpha", "permutations", "studies", "on", "compared", "order_by"
     "teachers": {name: {"statistic": [one per position], "p": 0.002, "alarm": true,
                         "where": 2500, "id": "s5...",                          the position of the largest statistic, null without an alarm
                         "finding": "Edema",                                    the finding that it comes from, null without an alarm
                         "findings": {finding: {"statistic": its largest, "p", "alarm", "where", "how": "alone" or "with others"}}}}
     "joint": the same, and "teachers": {name: {"statistic", "p", "alarm", "where", "how"}}, whose relation to the others changed;
              null where there is one teacher}
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/ surrounds the paper's scripts and is no package of its own

import data  # noqa: E402
import reference  # noqa: E402
import student  # noqa: E402
from evaluation import teachers  # noqa: E402
from runtime import (
    checkpoint,  # noqa: E402
    ranks,  # noqa: E402
)
from runtime.records import require_folder  # noqa: E402

CHUNK = 25  # permutations whose sums are taken in one matrix product


# ---------------------------------------------------------------------------------------------------------- the stream

def ordered(studies, key, path):
    """The studies sorted by record[key], numbers or texts, ties in the file's order. Raises ValueError naming the study that has none."""
    for study in studies:
        value = study.record.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError(f"{path}: study {study.id!r} has {key!r}: {value!r}, expected a number or a text to order by")
        if isinstance(value, str) != isinstance(studies[0].record[key], str):
            raise ValueError(f"{path}: {key!r} is a text in one of the studies {studies[0].id!r} and {study.id!r} and a number in the other, "
                             "expected one of them in all")
    return sorted(studies, key=lambda study: study.record[key])


def columns(studies, names, task, on, num_workers=0):
    """on 'errors' or 'findings' -> {finding: (N, n, K)}: what N teachers' texts on n studies say, less its mean; see the docstring of
    this file. 0, the mean, where there is no text or no label. Findings that nobody labels or reads are left out."""
    read = teachers.readings(studies, names, task, num_workers).values()
    out = {}
    for finding in task.findings:
        strata = [s.labels.get(finding) if on == "errors" else "all" for s in studies]
        said = [[None if r is None or strata[i] is None else (r.get(finding),) for i, r in enumerate(row)] for row in read]
        kinds = [None] if on == "errors" else [c for c in task.classes if any(cell == (c,) for row in said for cell in row)]
        x = np.zeros((len(names), len(studies), len(kinds)))
        for u, row in enumerate(said):
            known = np.array([cell is not None for cell in row])
            for k, kind in enumerate(kinds):
                x[u, :, k] = [cell is not None and (cell[0] != strata[i] if on == "errors" else cell[0] == kind) for i, cell in enumerate(row)]
            for stratum in set(strata) - {None}:
                inside = known & np.array([s == stratum for s in strata])
                if inside.any():
                    x[u, inside] -= x[u, inside].mean(0)
        if x.any():
            out[finding] = x
    return out


@torch.no_grad()
def log_probs(studies, names, task, args):
    """-> (N, n, 1): the student's log pi(t^u | v, l) per token in nats, less the teacher's mean; 0, the mean, where there is no text. With
    --output, what is computed is kept in OUTPUT.logps.jsonl, and the same command goes on from there."""
    device = ranks.init()
    encoder = data.Encoder(args.student, task, args.images, args.max_pixels, args.max_tokens)
    known, kept, key = {}, Path(f"{args.output}.logps.jsonl") if args.output else None, reference.cache_key(args, task, studies, names)
    if kept and kept.exists():
        for line in kept.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):  # a line that a kill tore
                record = json.loads(line)
                known |= {record["id"]: record["logps"]} if record["key"] == key else {}
    batches = [studies[i:i + args.batch_size] for i in range(0, len(studies), args.batch_size)]
    todo = [batch for batch in batches if not all(study.id in known for study in batch)]
    packed = student.PackedStudent(student.load(args.student, torch.bfloat16 if args.bf16 else torch.float32, device)) if todo else None
    with open(kept or os.devnull, "ab") as file:
        for batch in tqdm(todo, desc="log-probs"):
            examples = [encoder(study, data.student_prompt(study, task, args.prompt), [study.trajectories.get(name) for name in names])
                        for study in batch]
            inputs = student.to(student.pack(examples, packed.model), device)
            per_token = (packed(inputs)[0] / inputs["tokens"].clamp(min=1)).tolist()
            for study, row in zip(batch, per_token):
                known[study.id] = [value if name in study.trajectories else None for name, value in zip(names, row)]
                file.write(b"\n" + json.dumps({"id": study.id, "key": key, "logps": known[study.id]}).encode() + b"\n")
            file.flush()
    x = np.array([known[study.id] for study in studies], dtype=np.float64).T[:, :, None]  # None becomes NaN
    return np.nan_to_num(x - np.nanmean(x, 1, keepdims=True))


def scaled(x):
    """(n, D) -> float32 columns of mean 0 and variance 1; constant ones are left out."""
    x = x - x.mean(0)
    spread = x.std(0)
    return (x[:, spread > 1e-9] / spread[spread > 1e-9]).astype(np.float32)


def products(a, b):
    """(n, J), (n, K) -> (n, J K) scaled products."""
    return scaled((a[:, :, None] * b[:, None, :]).reshape(len(a), a.shape[1] * b.shape[1]))


def own_features(x):
    """x: {finding: (n, K)} of one teacher -> features (n, D), groups {(finding, how): indices of features}."""
    x = {finding: scaled(column) for finding, column in x.items()}
    parts = {(finding,): column for finding, column in x.items()}
    names = list(x)
    parts |= {(f, g): products(x[f], x[g]) for i, f in enumerate(names) for g in names[i + 1:]}
    return grouped(parts, lambda part: [(f, "alone" if len(part) == 1 else "with others") for f in part])


def joint_features(x, names):
    """x: {finding: (N, n, K)} -> the same for the teachers' pairs; groups {(finding, 'all pairs') or (teacher, 'with the others')}."""
    parts = {}
    for finding, column in x.items():
        column = [scaled(c) for c in column]
        parts |= {(finding, names[u], names[v]): products(column[u], column[v])
                  for u in range(len(names)) for v in range(u + 1, len(names))}
    return grouped(parts, lambda part: [(part[0], "all pairs"), (part[1], "with the others"), (part[2], "with the others")])


def grouped(parts, groups_of):
    """{part: (n, D_part)} -> their columns side by side, {group: indices}; a part counts in each group of groups_of(part)."""
    groups, at = {}, 0
    for part, block in parts.items():
        for group in groups_of(part) if block.shape[1] else ():
            groups.setdefault(group, []).extend(range(at, at + block.shape[1]))
        at += block.shape[1]
    return np.concatenate(list(parts.values()), 1), groups


# ------------------------------------------------------------------------------------------------------- the statistic

def blocks(n, step, window):
    """-> edges of the blocks that sums are taken over, [(left, middle, right)] in blocks, what is compared at each position.
    Raises ValueError where nothing can be compared."""
    step = step or (window // (1 + (window % 2 == 0)) if window else max(1, n // 20))
    if window and window % step:
        raise ValueError(f"--window {window} --step {step}: expected a window that is a multiple of the step")
    count = n // step
    reach = window // step if window else count
    first, last = (reach, count - reach) if window else (1, count - 1)
    if last < first:
        raise ValueError(f"{n} studies: expected at least {2 * (window or step)} for two windows of {window or step}")
    edges = np.array([*range(0, count * step, step), n])  # the last block takes the remainder
    return edges, [(max(0, b - reach), b, min(count, b + reach)) for b in range(first, last + 1)]


def statistics(features, groups, edges, places, permutations, seed, progress=None):
    """features (n, D), scaled. -> (1 + permutations, positions, groups) float64; row 0 is the real order. See the docstring of this file."""
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
            inside[i, block if start + i == 0 else rng.permutation(block), np.arange(n)] = 1
        sums = (inside.reshape(-1, n) @ features).reshape(many, len(edges) - 1, D)
        total = np.concatenate([np.zeros((many, 1, D), np.float32), sums.cumsum(1)], 1)
        difference = (total[:, middle] - total[:, left]) / n_a[:, None] - (total[:, right] - total[:, middle]) / n_b[:, None]
        out[start:start + many] = np.square(difference.astype(np.float32) * weight) @ member
        if progress:
            progress.update(many)
    out = np.cbrt(out)
    spread = out.std(0)
    return (out - out.mean(0)) / np.where(spread > 0, spread, 1)


def detect(x, names, step=None, window=None, permutations=500, alpha=0.05, seed=0, ids=None, quiet=True):
    """x: {finding: (N, n, K)} of `columns`, the stream in order. -> the object of drift.json (docstring of this file)."""
    n = next(iter(x.values())).shape[1]
    edges, places = blocks(n, step, window)
    streams = {name: own_features({finding: column[u] for finding, column in x.items()}) for u, name in enumerate(names)}
    if len(names) > 1:
        streams[None] = joint_features(x, names)
    with tqdm(total=len(streams) * (1 + permutations), desc="orders", disable=quiet) as progress:
        z = {name: statistics(*stream, edges, places, permutations, seed, progress) for name, stream in streams.items()}
    largest = np.max([s.max((1, 2)) for s in z.values()], 0)  # over all positions, groups and teachers, of each order
    positions = [int(edges[middle]) for _, middle, _ in places]

    def judged(values, **more):
        """values (positions,) of the real order."""
        p = float((largest >= values.max() - 1e-4).mean())  # sums of one order taken in two ways differ in their last bits
        return {"statistic": float(values.max()), "p": p, "alarm": p <= alpha, "where": positions[int(values.argmax())], **more}

    def stream(name):
        groups, real = list(streams[name][1]), z[name][0]
        best = {}
        for g, (of, how) in enumerate(groups):
            one = judged(real[:, g], how=how)
            if of not in best or one["statistic"] > best[of]["statistic"]:
                best[of] = one
        whole = judged(real.max(1))
        findings = {of: best[of] for of in x if of in best}
        at = whole["where"] if whole["alarm"] else None
        result = {**whole, "statistic": real.max(1).tolist(), "where": at, "id": ids[at] if ids and at is not None else None,
                  "finding": max(findings, key=lambda f: findings[f]["statistic"]) if whole["alarm"] else None, "findings": findings}
        return result | ({"teachers": {of: best[of] for of in names if of in best}} if name is None else {})

    allowed = int(alpha * (1 + permutations) + 1e-9)  # so many orders may reach an alarm
    return {"windows": positions, "ids": [ids[at] for at in positions] if ids else None, "threshold": float(np.sort(largest)[::-1][allowed]),
            "alpha": alpha, "permutations": permutations, "studies": n, "teachers": {name: stream(name) for name in names},
            "joint": stream(None) if None in z else None}


# ------------------------------------------------------------------------------------------------------------- the command

def parse(argv=None):
    parser = argparse.ArgumentParser(description="Do the teachers drift along the stream of studies? Names which, where, in which finding.")
    parser.add_argument("--studies", required=True, help="studies.jsonl, in the stream's order")
    parser.add_argument("--task_file", help="task.json; without it MIMIC-CXR's 14 findings")
    parser.add_argument("--split", help="only these studies (default: all)")
    parser.add_argument("--teachers", help="NAME,...: only these teachers (default: all)")
    parser.add_argument("--order_by", metavar="KEY", help="order the stream by this number or text of each record (default: the file's order)")
    parser.add_argument("--on", choices=("errors", "findings"), help="what of the texts is compared (default: errors where there are labels)")
    parser.add_argument("--window", type=int, metavar="W", help="compare W studies with the next W (default: all before with all after)")
    parser.add_argument("--step", type=int, help="studies from one position to the next (default: half an even window, or a 20th of the stream)")
    parser.add_argument("--permutations", type=int, default=500, help="random orders of the stream (default: %(default)s)")
    parser.add_argument("--alpha", type=float, default=0.05, help="how likely a stationary stream may raise any alarm (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random orders (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read the texts (default: %(default)s, this one)")
    g = parser.add_argument_group("the student's log-probs")
    g.add_argument("--student", help="folder or hub id of a Qwen2.5-VL")
    g.add_argument("--images", default=".", help="folder that the image paths are relative to (default: %(default)s)")
    g.add_argument("--prompt", choices=("student", "teacher"), default="student", help="teacher: Appendix B's, which names the diagnosis")
    g.add_argument("--max_pixels", type=int, default=1024 * 28 * 28, help="pixels per image, 784 make a token (default: %(default)s)")
    g.add_argument("--max_tokens", type=int, default=8192, help="tokens of a study; longer responses lose their ends (default: %(default)s)")
    g.add_argument("--batch_size", type=int, default=4, help="studies per forward (default: %(default)s)")
    g.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(), help="weights in bf16")
    parser.add_argument("--output", help="drift.json to write; the log-probs are kept beside it")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args(argv)
    for name, least in (("window", 1), ("step", 1), ("permutations", 1), ("batch_size", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: expected at least {least}")
    if not 1 / (1 + args.permutations) <= args.alpha < 1:
        parser.error(f"--alpha {args.alpha}: expected 1 / (1 + permutations) = {1 / (1 + args.permutations):.4f} or more, and less than 1")
    return args


def table(result):
    """The object of drift.json -> text."""
    lines = [f"{result['studies']} studies by {result['order_by'] or 'the order of the file'}, on {result['on']}; {result['compared']}, "
             f"{len(result['windows'])} positions; {result['permutations']} random orders",
             f"a stationary stream raises any alarm with probability {result['alpha']:g}; threshold {result['threshold']:.2f}",
             f"{'':24}{'statistic':>10}{'p':>8}  where"]
    rows = [*result["teachers"].items(), *([("jointly", result["joint"])] if result["joint"] else [])]
    for name, row in rows:
        line = f"{name:24}{max(row['statistic']):>10.2f}{row['p']:>8.3f}"
        if row["alarm"]:
            line += f"  DRIFT at study {row['where']} ({row['id']}), {row['finding']} {row['findings'][row['finding']]['how']}"
            more = [f for f, one in row["findings"].items() if one["alarm"] and f != row["finding"]]
            line += f"; also {', '.join(more)}" if more else ""
            changed = {teacher: one["statistic"] for teacher, one in row.get("teachers", {}).items() if one["alarm"]}
            line += f"; most of all {max(changed, key=changed.get)} with the others" if changed else ""
        lines.append(line)
    return "\n".join(lines)


def run(args):
    """-> the object of drift.json; prints the table."""
    if args.output:
        require_folder(args.output)
    task = data.load_task(args.task_file)
    studies = data.read_studies(args.studies, task, args.split)
    names = data.keep_teachers(studies, args.teachers)
    if not names:
        raise ValueError(f"{args.studies}: no study has trajectories, expected the teachers' texts")
    if args.order_by:
        studies = ordered(studies, args.order_by, args.studies)
    blocks(len(studies), args.step, args.window)
    if args.student:
        student.require_family(args.student)
    on = args.on or ("errors" if any(study.labels for study in studies) else "findings")
    x = columns(studies, names, task, on, args.num_workers)
    if args.student:
        x["log-prob"] = log_probs(studies, names, task, args)
    if not x:
        raise ValueError(f"{args.studies}: the texts never differ in {on}, expected "
                         + ("labels of findings" if on == "errors" else "texts in which findings can be read"))
    compared = f"{args.window} studies against the next {args.window} (Eq. 2)" if args.window else "all before against all after (Def. 2.2)"
    result = {"on": on + (" and log-prob" if args.student else ""), "compared": compared, "order_by": args.order_by,
              **detect(x, names, args.step, args.window, args.permutations, args.alpha, args.seed, [s.id for s in studies], quiet=None)}
    print(table(result))
    if args.output:
        checkpoint.write_text(Path(args.output), json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
    return result


def main():
    args = parse()
    try:
        run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"drift: {error}") from None


if __name__ == "__main__":
    main()
