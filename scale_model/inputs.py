"""What stage 1 starts from when no data is named: a world, and the base student as a folder."""

from pathlib import Path

from runtime import ranks
from runtime.records import atomic
from scale_model.base import train_base, write_student
from scale_model.world import make


def make_inputs(root, seed, anew=False):
    """Makes ROOT/world and ROOT/base where they are missing, in the process group that is running.

    root  folder that they lie in
    seed  of the world
    anew  train the base student again instead of taking the one that ships
    Returns {"studies", "images", "task_file", "replay", "base"} as flags of spd.py.
    """
    world, base = Path(root) / "world", Path(root) / "base"
    ranks.print_once(f"no --studies: the scale model, in {root}")
    ranks.on_rank_zero(lambda: write_missing(world, base, seed, anew))
    return {"studies": world / "studies.jsonl", "images": world, "task_file": world / "task.json",
            "replay": world / "replay.jsonl", "base": base}


def write_missing(world, base, seed, anew):
    """Writes the two folders of `make_inputs`, each whole or not at all."""
    if not world.exists():
        with atomic(world) as temporary:
            make(temporary, seed=seed)
    if not base.exists():
        trained = base.with_name("base.safetensors")
        if anew:
            train_base(trained)
        with atomic(base) as temporary:
            write_student(temporary, *((trained, None) if anew else ()))
