"""A results file: what was measured, with its settings and all that is missing.

    RESULTS.json           {"settings", "rows", "missing", "table", ...}, written whole at the end
    RESULTS.json.parts/    part-RANK.jsonl, [key, value] a line, while the work goes on; the same
                           command continues from there
"""

import contextlib
import hashlib
import json
from pathlib import Path

import data
from runtime import ranks
from runtime.checkpoint import fingerprint
from runtime.records import printable, write_text

QUIET = ("json", "strict", "num_workers", "output")  # flags that change no figure


def begin(args, inputs, benches):
    """What --output holds already, before anything is asked.

    args     flags; `output` is the results file, or None
    inputs   files and student folders that the figures depend on
    benches  list of datasets.Benchmark with the studies that will be asked
    Returns (the content of --output if this very command wrote it from these very files, else None;
    the settings to write; the folder of the parts, or None without --output). Raises ValueError
    where --output is a file of something else.
    """
    settings = {key: value for key, value in vars(args).items() if key not in QUIET}
    digests = {path: fingerprint(path) for path in inputs if path}
    digests["the studies and the sizes of their images"] = digest_of(benches)
    seen = {f"--{name}": str(value) for name, value in settings.items()}
    settings["sha256"] = list(digests.values())
    settings = json.loads(json.dumps(settings))  # as a file gives them back
    before = read_before(args.output) if args.output else None
    held = hashlib.sha256(json.dumps(before).encode()).hexdigest() if before else "no results"
    ranks.require_same(lambda: {**seen, **digests, f"what --output {args.output} holds": held})
    if not args.output:
        return None, settings, None
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    known = before is not None and before["settings"] == settings
    return before if known else None, settings, Path(f"{args.output}.parts") / key


def digest_of(benches):
    """sha256 over the studies: what is asked and scored, and how large their images are."""
    asked = []
    for bench in benches:
        for study in bench.studies:
            sizes = [data.image_path(path, bench.images).stat().st_size for path in study.images]
            asked.append([study.id, study.images, study.labels, study.report, sizes])
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def read_before(path):
    """The content of a results file, None without a file. Raises ValueError for another file."""
    if not Path(path).exists():
        return None
    before = None
    if Path(path).is_file():  # reading a pipe would wait
        with contextlib.suppress(ValueError, RecursionError):
            before = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(before, dict) or "settings" not in before:
        raise ValueError(f"{path}: exists and was not written by evaluate.py, "
                         "expected another --output")
    return before


def end(args, content, known=False):
    """Prints the table and what is missing, writes --output, prints the line of --json.

    args     flags
    content  of the results file: {"settings", "rows", "missing", "table", ...}
    known    whether --output holds it already
    Returns the rows. Raises SystemExit(1) with --strict if anything is missing.
    """
    missing = content["missing"]
    if known:
        ranks.print_once(f"{args.output} holds these results already")
    ranks.print_once(content["table"])
    if missing:
        ranks.print_once(missing_lines(missing, args.output))
    if args.output and not known:
        text = json.dumps(content, indent=1) + "\n"
        ranks.on_rank_zero(lambda: write_text(Path(args.output), text))
        ranks.on_rank_zero(lambda: remove_parts(Path(f"{args.output}.parts")))
    if args.json:
        ranks.print_once(json.dumps({"rows": content["rows"], "missing": len(missing)}))
    if missing and args.strict:
        raise SystemExit(1)
    return content["rows"]


def remove_parts(folder):
    """Removes OUT.parts: of all settings what `begin` and shared_map make, and nothing else.

    folder  which stays where other files are in it
    """
    keys = [key for key in folder.glob("?" * 16) if not key.is_symlink()]
    parts = [part for key in keys for part in key.rglob("part-*.jsonl")]
    for part in parts:
        part.unlink()
    inner = {above for part in parts for above in part.parents if folder in above.parents}
    for path in sorted({folder, *inner}, reverse=True):
        with contextlib.suppress(OSError):  # other files are in it
            path.rmdir()


def missing_lines(missing, output):
    """How many things are missing and the first twenty of them, as text."""
    lines = [f"missing, left out: {len(missing)}", *map(printable, missing[:20])]
    if len(missing) > 20:
        where = f", all of them in {output}" if output else ""
        lines.append(f"... and {len(missing) - 20} more{where}")
    return "\n  ".join(lines)
