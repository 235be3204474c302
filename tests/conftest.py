"""A tiny world and a tiny random student of the real class, made once a session.

Nothing is downloaded.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

# every figure here is a CPU's
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
ROOMS = ("runtime", "evaluation", "tools", "experiment")
sys.path[:0] = map(str, [ROOT, ROOT / "tools", TESTS, *(TESTS / name for name in ROOMS)])

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from faults import Job  # noqa: E402

import data  # noqa: E402
import student  # noqa: E402
from scale_model import base as scale_base  # noqa: E402
from scale_model import world as scale_world  # noqa: E402

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


# Files that take long, the longest first: begun last, one of them would keep a worker busy when all
# other files are done.
LONG = ("test_ladder.py", "test_real.py", "test_findings.py", "test_faults.py", "test_fuzz.py",
        "test_stages.py", "test_distributed.py", "test_drift.py", "test_evaluate_files.py",
        "test_checkpoint.py", "test_other_domain.py", "test_messages.py", "test_bench.py")


def pytest_configure(config):
    """The files go to the workers in the order of pytest_collection_modifyitems."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def write_positives(file, studies):
    """t+ without a sampler: a teacher's text and a word."""
    with open(file, "w") as out:
        for i, study in enumerate(studies):
            t_plus = list(study.trajectories.values())[i % 7] + " overall."
            out.write(json.dumps({"id": study.id, "t_plus": t_plus}) + "\n")
    return file


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with 24 training films, 4 + 8 others, studies.jsonl, task.json, replay.jsonl."""
    folder = tmp_path_factory.mktemp("world")
    scale_world.make(folder, seed=0, train=24, validate=4, test=8, replay=12)
    return folder


@pytest.fixture(scope="session")
def task(world):
    return data.load_task(world / "task.json")


@pytest.fixture(scope="session")
def studies(world, task):
    return data.read_studies(world / "studies.jsonl", task)


@pytest.fixture(scope="session")
def base(tmp_path_factory, studies):
    """The folder of a random student."""
    folder = tmp_path_factory.mktemp("base")
    texts = [text for study in studies for text in study.trajectories.values()]
    model, tokenizer = scale_base.build_student(0, texts)
    scale_base.save_student(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="session")
def positives(tmp_path_factory, studies):
    """For 23 of the 24 training studies, so that ranks and batches come out uneven."""
    file = tmp_path_factory.mktemp("positives") / "positives.jsonl"
    return write_positives(file, [s for s in studies if s.split == "train"][1:])


@pytest.fixture
def model(base):
    return student.load(base)


@pytest.fixture(scope="session")
def processor(base, task, world):
    return student.Processor(base, task, world)


@pytest.fixture(scope="session")
def talker(base, processor, tmp_path_factory):
    """The folder of a random student that likes to end, and writes hardly any chat markers.

    Its texts have all lengths, and some do not end in time.
    """
    model, folder = student.load(base), tmp_path_factory.mktemp("talker")
    tokenizer = processor.tokenizer
    markers = [i for i in tokenizer.all_special_ids if i != processor.end]
    with torch.no_grad():
        model.lm_head.weight[markers] *= 0.2
        model.lm_head.weight[processor.end] *= 8
    scale_base.save_student(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="session")
def script(tmp_path_factory):
    """script("spd.py", "--flag", ..., ranks=2) runs a script as a user would.

    start: "fork" of a process that has all imported, "python" or "torchrun"; a start takes a
    moment, or 5 to 10 seconds a process. It returns what it ended with in .returncode and what it
    printed in .stdout.
    """
    def run(name, *flags, ranks=1, expect=0, start="fork"):
        if start == "fork":
            with Job(name, flags, tmp_path_factory.mktemp("script") / "out", ranks) as job:
                codes = job.wait(600)
                done = SimpleNamespace(returncode=max(map(abs, codes)), stdout=job.text())
        else:
            name = ["-m", name] if "." not in name else [str(ROOT / name)]
            if start == "torchrun":
                name = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone",
                        *name]
            done = subprocess.run(
                [sys.executable, *name, *map(str, flags)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=600, check=False)
        assert done.returncode == expect, done.stdout[-6000:]
        return done
    return run


@pytest.fixture
def run_flags(world, base):
    """The flags that name the tiny world and student."""
    return ["--preset", "demo", "--studies", world / "studies.jsonl", "--images", world,
            "--task_file", world / "task.json", "--student", base]
