"""README and docs are held to the code.

Files and their lines, equations, flags, links, tests that are named, log keys, the loss by hand.
"""

import ast
import re
import subprocess
import sys

import check
import pytest
import torch
from conftest import ROOT

import apo
import evaluate
import selfdistill
import spd

sys.path.insert(0, str(ROOT / "tools"))
import prepare_mimic  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = [
    *(ROOT / "docs").glob("*.md"), ROOT / "experiment" / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = {"README.md": README}
PAGES |= {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in DOCS}
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.py", "*/*.py", "tests/*/*.py") for path in ROOT.glob(pattern))


def section(title, page=README):
    return page.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def table(text, heading):
    """The rows of the table whose first row begins with `heading`, as lists of cells."""
    lines = text[text.index(heading):].split("\n\n", 1)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def code(text):
    return re.findall(r"`([^`]+)`", text)


def calls_of(text, method):
    """The calls of `anything.method(...)` in a source text."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == method:
                yield node


FILES = [(code(cells[0]), *cells[1:]) for cells in table(section("What is where"), "| file |")]


def test_every_script_stands_in_the_file_table_once():
    named = [name for names, *_ in FILES for name in names]
    scripts = [path for path in SCRIPTS if "/" not in path]
    folders = {path.split("/")[0] + "/" for path in SCRIPTS if "/" in path}
    once = sorted(name for name in named if name.count("/") == 0 or name in folders)
    assert once == sorted([*scripts, *folders])
    assert all((ROOT / name).exists() for name in named)


@pytest.mark.parametrize("names, lines, what, paper", FILES, ids=[names[0] for names, *_ in FILES])
def test_the_file_table_gives_lines_to_the_nearest_ten_and_equations_that_stand_there(
        names, lines, what, paper):
    files = [path for name in names for path in SCRIPTS
             if path == name or name.endswith("/") and path.startswith(name)]
    counts = [len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in files]
    now = f"{names}: {round(sum(counts), -1):,} lines now"
    written = int(lines.replace(",", "") or 0)
    assert not lines or sum(counts) == pytest.approx(written, abs=5 * len(names)), now
    text = "\n".join((ROOT / path).read_text(encoding="utf-8") for path in files)
    for first, last in re.findall(r"Eq\. (\d+)(?:-(\d+))?", paper):
        for n in (first, last or first):
            wanted = rf"Eq\. (?:\d+-)?{n}\b|Eq\. {n}-|\({n}\)|\({n}-|-{n}\)"
            assert re.search(wanted, text), f"{names}: {paper}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"(?m)^#+ (.*)$", file.read_text(encoding="utf-8"))
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
            assert anchor in [title.replace(" ", "-") for title in anchors], target


def test_every_flag_that_is_written_exists_and_every_flag_of_a_stage_has_a_help_line():
    sources = {path: (ROOT / path).read_text(encoding="utf-8") for path in SCRIPTS}
    defined = {
        flag for text in sources.values() for flag in re.findall(r"\"(--[a-z0-9_]+)\"", text)}
    foreign = {
        # torchrun
        "--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--shutdown-timeout",
        "--max-restarts",
        # pytest-xdist
        "--dist",
        # hf, SLURM
        "--local-dir", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task",
        "--time", "--signal", "--requeue",
        # wget, rsync
        "--user", "--ask-password", "--cut-dirs", "--files-from",
        # vLLM
        "--served-model-name", "--generation-config", "--max-model-len", "--limit-mm-per-prompt",
        "--dtype", "--max-num-batched-tokens", "--no-enable-chunked-prefill", "--enable-lora",
        "--lora-modules", "--chat-template", "--model",
    }
    for page, text in PAGES.items():
        written = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
        negated = {flag for flag in written if flag.replace("--no-", "--") in defined}
        unknown = written - negated - defined - foreign
        assert not unknown, f"{page}: {sorted(unknown)}"
    commands = {path: text for path, text in sources.items() if not path.startswith("tests/")}
    for path, text in commands.items():
        for call in calls_of(text, "add_argument"):
            # `early` reads two flags before --help is printed
            if ast.unparse(call.func.value) != "early":
                helped = any(keyword.arg == "help" for keyword in call.keywords)
                assert helped, f"{path}:{call.lineno}: no help line"


def test_the_tests_that_readme_names_exist():
    names = set(re.findall(r"\btest_\w+(?:\.py)?(?:::\w+)?", "\n".join(PAGES.values())))
    assert len(names) > 8
    for name in names:
        file, _, function = name.rpartition("::")
        if name.endswith(".py"):
            assert list((ROOT / "tests").rglob(name)), name
        else:
            files = [ROOT / path for path in SCRIPTS if "/test_" in path]
            if file:
                files = [next((ROOT / "tests").rglob(file))]
            texts = [path.read_text(encoding="utf-8") for path in files]
            assert any(f"def {function}(" in text for text in texts), name


def test_the_notation_table_names_what_the_code_has():
    named = ("apo.py", "data.py", "student.py", "spd.py", "tools/drift.py")
    sources = "\n".join((ROOT / path).read_text(encoding="utf-8") for path in named)
    rows = table(section("Eq. 11 in numbers, and in your code"), "| paper |")
    assert len(rows) >= 10
    for symbol, here, _ in rows:
        for name in code(here):
            for word in re.findall(r"[A-Za-z_]{3,}", name.removesuffix(".py")):
                if word not in ("name", "tools", "drift", "study", "spd", "apo"):
                    assert re.search(rf"\b{word}\b", sources), f"{symbol}: {word}"


def test_the_loss_by_hand_is_what_the_code_computes():
    rows = table(section("Eq. 11 in numbers, and in your code"), "| | t+ |")
    numbers = [[float(cell) for cell in cells[1:5]] for cells in rows]
    logps = torch.tensor([numbers[0]], requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 0.5])
    losses, rewards = apo.apo_loss(logps, torch.tensor([numbers[1]]), weights=weights, beta=0.5)
    losses.sum().backward()
    assert rewards.tolist() == [numbers[2]]
    assert torch.allclose(rewards.exp(), torch.tensor(numbers[3]), atol=5e-4)
    weighted = rewards.exp() * torch.tensor([1.0, 1.0, 2.0, 0.5])
    assert torch.allclose(weighted, torch.tensor(numbers[4]), atol=5e-4)
    text = section("Eq. 11 in numbers, and in your code")
    p = f"{(-losses).exp().item():.3f}"
    assert f"= {p} (Eq. 9), loss = -log {p} = {losses.item():.3f} (Eq. 11)" in text
    assert f"0.5 x ({', '.join(f'{g:.3f}' for g in (logps.grad[0] / 0.5).tolist())})" in text


def test_the_loss_runs_in_a_file_of_its_own_with_torch_alone(tmp_path):
    """What README tells to copy: the source of the two functions, and `import torch` above it."""
    source = (ROOT / "apo.py").read_text(encoding="utf-8")
    functions = {
        node.name: ast.get_source_segment(source, node)
        for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    copied = ["import torch", functions["response_logps"], functions["apo_loss"]]
    (tmp_path / "loss.py").write_text("\n\n\n".join(copied) + "\n")
    (tmp_path / "use.py").write_text(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import loss\n"
        "assert set(sys.modules) - before == {'loss'}\n"
        "values = torch.load('given.pt', weights_only=True)\n"
        "torch.save("
        "[loss.response_logps(*values[:2]), *loss.apo_loss(*values[2:], beta=0.3)], 'got.pt')\n")
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 11, (3, 7), generator=g)
    labels[:, :3] = -100
    given = [
        torch.randn(3, 7, 11, generator=g), labels,
        torch.randn(3, 5, generator=g), torch.randn(3, 5, generator=g),
        torch.rand(4, generator=g), torch.tensor([[True, False, True, True]] * 3)]
    torch.save(given, tmp_path / "given.pt")
    subprocess.run([sys.executable, "use.py"], cwd=tmp_path, check=True)
    want = [apo.response_logps(*given[:2]), *apo.apo_loss(*given[2:], beta=0.3)]
    for ours, theirs in zip(want, torch.load(tmp_path / "got.pt", weights_only=True), strict=True):
        assert torch.equal(ours, theirs)


def test_every_key_of_the_log_is_explained():
    """What the two loops and runtime/log.py write, with NAME for a teacher."""
    explained = {key for cells in table(section("Log keys"), "| key |") for key in code(cells[0])}
    source = (ROOT / "spd.py").read_text(encoding="utf-8")
    (keys,) = (node.value for node in ast.walk(ast.parse(source))
               if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "keys")
    of_spd = eval(ast.unparse(keys), {"names": ["NAME"]})
    assert len(of_spd) == 4 and set(of_spd) | set(apo.log_keys(["NAME"])) <= explained
    written = {"learning_rate", "grad_norm", "seconds", "tokens_per_second", "peak_gib"}
    assert written <= explained
    rows = set(of_spd) | set(apo.log_keys(["NAME"])) | written
    assert explained <= rows, f"no longer in the log: {sorted(explained - rows)}"


def test_the_way_to_the_papers_tables_is_commands_that_carry_on():
    """A shell expands docs/reproduce.md and prints each command's words.

    The real parsers take them, and what one reads another wrote.
    """
    page = PAGES["docs/reproduce.md"].split("## Under SLURM")[0]
    lines = "\n".join(line for line in page.splitlines() if line.startswith("    "))
    prints = (
        "for name in python torchrun; do "
        "eval \"$name() { printf '%s\\x1f' \\\"\\$@\\\"; echo; }\"; done\n")
    command = ["bash", "-euc", prints + lines]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    parsers = {
        "tools/prepare_mimic.py": prepare_mimic,
        "tools/check.py": check,
        "spd.py": spd,
        "selfdistill.py": selfdistill,
        "apo.py": apo,
        "evaluate.py": evaluate,
    }
    asked = []
    for words in (line.split("\x1f")[:-1] for line in done.stdout.splitlines()):
        (at,) = (i for i, word in enumerate(words) if word in parsers)
        asked.append((words[at], parsers[words[at]].parse(words[at + 1:])))
    assert {name for name, _ in asked} == set(parsers) and len(asked) >= 14
    # the hub's, the teachers', prepare_mimic's
    made = {"qwen7b", "with_teachers.jsonl", "studies.jsonl"}
    for name, args in asked:
        inputs = [getattr(args, key, None) for key in ("studies", "positives")]
        inputs += getattr(args, "results", None) or []
        student = getattr(args, "student", None)
        students = student if isinstance(student, list) else [student]
        inputs += [value.rpartition("=")[2] for value in students if value]
        assert {value for value in inputs if value} <= made, f"{name}: {inputs}"
        out = getattr(args, "output_dir", None)
        if out:
            made |= {f"{out}/student", f"{out}/positives.jsonl"}
        else:
            made |= {getattr(args, "output", None), getattr(args, "out", None)}
