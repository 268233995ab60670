"""Jobs whose result is one file, with its manifest beside it; a hidden folder holds the work until it is done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any

from longlens.errors import InputError
from longlens.io.results import MANIFEST, as_json, job_before, read_manifest, write_whole, writing
from longlens.jobs.output import OutputFolder, output_folder
from longlens.jobs.progress import ProgressCallback
from longlens.jobs.runner import Job, run

# the file that marks a folder whose result was refused: it holds the work for the same job, and blocks no other
REFUSED = "refused"


class RefusedResultError(InputError):
    """A job was done to its end, and its result is of no use."""


def run_to_file(
    job: Job, name: str, output: Path | None, progress: ProgressCallback, beside: Mapping[str, Path] | None = None
) -> tuple[bytes, dict[str, Any]]:
    """Run a job that makes the file `name`; returns its bytes and the manifest, and writes both if `output` is given.

    `beside`: other files of the job, and their paths. After an interruption the same call continues.
    """
    with _work_folder(name, output, job) as folder:
        try:
            run(job, folder.path, progress)
        except RefusedResultError:
            (folder.path / REFUSED).touch()
            raise
        result_path = folder.path / name
        data = result_path.read_bytes()
        manifest = read_manifest(folder.path)
        if output is None:
            folder.discard()
        else:
            targets = {name: output, **(beside or {})}
            manifest["files"] = {targets[file].name: size for file, size in manifest["files"].items()}
            with writing(output):
                write_whole(output.with_name(f"{output.name}.{MANIFEST}"), as_json(manifest))
                for other, target in (beside or {}).items():
                    write_whole(target, (folder.path / other).read_bytes())
                write_whole(output, data)
                # a folder without its result is done with, and blocks no other job
                result_path.unlink()
                rmtree(folder.path)
    return data, manifest


def refuse_folder(output: Path) -> None:
    """Raise `InputError` unless `output` may be a file."""
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise InputError(f"expected the output to be a file in a folder that exists, got {output}")


@contextmanager
def _work_folder(name: str, output: Path | None, job: Job) -> Iterator[OutputFolder]:
    """A hidden folder beside the output, from which an interrupted job continues, or a temporary folder."""
    if output is None:
        with output_folder(None) as folder:
            yield folder
        return
    refuse_folder(output)
    path = output.with_name(f".{output.name}.longlens")
    if (path / MANIFEST).is_file() and read_manifest(path)["complete"] and not (path / name).exists():
        # an earlier run was killed while it removed the folder
        rmtree(path)
    elif (path / REFUSED).is_file() and (path / MANIFEST).is_file():
        _discard_another(path, job)
        # while the job goes on with it, it is nobody else's to discard
        (path / REFUSED).unlink(missing_ok=True)
    yield OutputFolder(path)


def _discard_another(path: Path, job: Job) -> None:
    """Remove the folder of a refused result, unless it is this job's, whose work it spares."""
    try:
        job_before(path, job.key)
    except InputError:
        rmtree(path)
