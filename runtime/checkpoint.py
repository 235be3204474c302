"""Checkpoints of a run: what trains, the optimiser's shards, and a manifest written last.

    RUN/step-N/trainable.safetensors   the trainable parameters by name
    RUN/step-N/optimizer-R.safetensors masters and moments, of each rank where they are sharded
    RUN/step-N/manifest.json           the step, sha256 of the files above and of itself, the log's
                                       open interval

Nothing random is saved, since a run is a function of its settings and its step (training.py).
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from runtime import adapter, ranks
from runtime.records import atomic, fsync, line_of, parse_line, temporary_of

# The files of a student's folder from which its figures come. What it says of generating, chat
# templates and the model card are not among them: they are neither read nor kept.
OF_A_STUDENT = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json",
                "preprocessor_config.json", "processor_config.json", "tokenizer*.json",
                "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")


def sha256(file):
    """The sha256 of a file's content, as a hex digest."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(path):
    """A text that changes where the content of an input changes.

    path  a file, or a student's folder, of which weights, configs and tokenizer count; of an
          adapter its base counts too
    Returns a hex digest; a hub id is returned as it is.
    """
    path = Path(path)
    if not path.exists():
        return str(path)
    files = [path]
    if path.is_dir():
        files = sorted({file for pattern in OF_A_STUDENT for file in path.glob(pattern)
                        if file.is_file()})
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {sha256(file)}".encode())
    if adapter.is_adapter(path):
        digest.update(fingerprint(adapter.base_of(path)).encode())
    return digest.hexdigest()


def as_umask_says(folder):
    """Gives a folder's weights the permissions of any new file; safetensors lets none but their
    owner read them."""
    umask = os.umask(0o077)  # it can only be read by setting it
    os.umask(umask)
    for file in Path(folder).glob("*.safetensors"):
        file.chmod(0o666 & ~umask)


def save_checkpoint(folder, step, parameters, optimizer, extra, keep):
    """Writes step-N/ of a run folder, which gets this name when it is complete; all ranks call it.

    folder      the run folder
    step        how many steps are done
    parameters  {name: parameter} of what trains
    optimizer   its state is saved in fp32 as it is; of a sharded one each rank saves its part
    extra       dict that is put into the manifest
    keep        how many checkpoints are kept, the newest ones
    Raises OSError where writing fails, as on a full disk; nothing of step-N/ is left then, and the
    checkpoints before it stay.
    """
    folder, final = Path(folder), Path(folder) / f"step-{step:06d}"
    first = ranks.rank() == 0
    with atomic(final) if first else contextlib.nullcontext(temporary_of(final)) as temporary:
        if first:
            temporary.mkdir()
        ranks.barrier()
        local = getattr(optimizer, "optim", optimizer)
        if first or local is not optimizer:
            state = {f"{name}:{key}": value.cpu().contiguous()
                     for name, p in parameters.items()
                     for key, value in local.state.get(p, {}).items()}
            save_file(state, temporary / f"optimizer-{ranks.rank()}.safetensors")
        ranks.barrier()
        if first:
            trained = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
            save_file(trained, temporary / "trainable.safetensors")
            as_umask_says(temporary)
            digests = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
            manifest = {"step": step, "sha256": digests, **extra}
            (temporary / "manifest.json").write_bytes(sealed(manifest))
            for log in folder.glob("*.jsonl"):  # a resumed run does not write its lines again
                fsync(log)
    if first:
        steps = sorted(folder.glob("step-*"))
        at = steps.index(final) + 1
        # Those after this step were found damaged when this run went on from an earlier one.
        for old in [*steps[:max(0, at - keep)], *steps[at:]]:
            shutil.rmtree(old)


def sealed(manifest):
    """The bytes of manifest.json: the manifest with the sha256 of its own JSON as the last key."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return line_of({**manifest, "manifest_sha256": digest})


def read_manifest(file):
    """The manifest that a file holds. Raises ValueError unless its bytes are those of `sealed`."""
    content = file.read_bytes()
    manifest = parse_line(content)
    manifest.pop("manifest_sha256", None)
    if sealed(manifest) != content:
        raise ValueError("manifest.json is not as it was written, expected its own sha256 in it")
    return manifest


def newest_checkpoint(folder):
    """The newest checkpoint whose manifest and files are as they were written.

    folder  the run folder
    Returns (its path, its manifest), or (None, None) where there is none.
    """
    for path in sorted(Path(folder).glob("step-*"), reverse=True):
        try:
            manifest = read_manifest(path / "manifest.json")
            if all(sha256(path / name) == digest for name, digest in manifest["sha256"].items()):
                return path, manifest
            reason = "its files do not match its manifest"
        except (OSError, ValueError) as error:
            reason = str(error)
        ranks.print_once(f"warning: {path} is damaged ({reason}); falling back to the one before")
    return None, None


def load_checkpoint(path, parameters, optimizer):
    """Puts a checkpoint's weights and optimiser state back, masters and moments in fp32.

    path        step-N/
    parameters  {name: parameter} of what trains, which are overwritten
    optimizer   whose state is overwritten
    Raises ValueError where the checkpoint is of other parameters.
    """
    weights = load_file(path / "trainable.safetensors")
    if set(weights) != set(parameters):
        raise ValueError(f"{path}: holds other parameters than --train makes trainable")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(weights[name])
    local = getattr(optimizer, "optim", optimizer)
    shard = path / f"optimizer-{ranks.rank() if local is not optimizer else 0}.safetensors"
    with safe_open(shard, "pt") as file:
        for key in file.keys():
            name, _, part = key.rpartition(":")
            p = parameters[name]
            value = file.get_tensor(key)
            local.state[p][part] = value if part == "step" else value.to(p.device)
