"""Converting a model: a piece of a weight at a time, interrupted and gone on with as one likes.

Everything is written in a folder beside the target, `<target>.partial`, which becomes the target,
or gives it its file, when all is there and measured. A weight is read, quantised and written some
millions of numbers at a time, so the memory that it takes is far below that of a layer, unless a
checkpoint holds all experts of a layer in one tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import ktcore
from ktcore.convert import metadata
from ktcore.convert.errors import ConversionError
from ktcore.convert.files import (
    FolderTensors,
    GgufTensors,
    Layout,
    Out,
    Writer,
    folder_layout,
    gguf_layout,
)
from ktcore.convert.importance import Importance, measure, read_imatrix, write_imatrix
from ktcore.convert.journal import Journal, only_one
from ktcore.convert.quantizing import Error, quantize, taken_over
from ktcore.convert.targets import (
    GROUP_SIZES,
    Options,
    Target,
    fitting_group_size,
    format_of,
    get_target,
    quantised,
    quantization_config,
)
from ktcore.convert.weights import Weight, floats, left_over, read_weights
from ktcore.formats import Format
from ktcore.formats.floating import Plain
from ktcore.models import load_model, perplexity
from ktcore.models.family import families
from ktcore.models.loading import EMBEDDED
from ktcore.models.packing import source_files
from ktcore.models.source import Source, open_source

PIECE = 1 << 22  # weights that are read and written at a time
ROOMY = 1 << 10  # columns that any group size divides
SPARE_BYTES = 64 << 20  # of the disk, that a conversion leaves alone

JOURNAL, LOCK, IMATRIX = "journal.jsonl", "lock", "imatrix.gguf"
REPORT = "conversion.json"
STAGE = "stage "  # begins the names of the steps that write weights

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Stage:
    """What is written together, and remembered as done: what is before the layers, one of them, or
    what is behind them."""

    name: str
    weights: list[Weight]


def convert(
    model: str | Path | None,
    to: str,
    out: str | Path,
    *,
    group_size: int = 32,
    experts_only: bool = False,
    pure: bool = False,
    imatrix: str | Path | None = None,
    calibrate: str | Path | None = None,
    save_imatrix: str | Path | None = None,
    perplexity_text: str | Path | None = None,
    measure_perplexity: bool = True,
    overwrite: bool = False,
    resume: bool = True,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Convert a model.

    Args:
        model: what `ktcore.models.load_model` takes; None for the model that ktcore ships.
        to: "int8", "int4" or "bf16", for a folder as Hugging Face lays it out; "q4_k", "q6_k" or
            "q8_0", for a GGUF file.
        out: the folder or file to make.
        group_size: weights that share a scale in int4: 32, 64 or 128.
        experts_only: leave everything but the experts as precise as it is.
        pure: GGUF: store every matrix in the one type, where q4_k else stores some as q6_k.
        imatrix: a file of llama.cpp's importance matrices, to weigh errors by.
        calibrate: a text file to make one from, by running the model over it. Its experts are
            then in memory twice, as stored and as the backend packs them.
        save_imatrix: where to keep what `calibrate` made.
        perplexity_text: a text file to measure the perplexity on, before and after.
        measure_perplexity: without such a file, whether to do so on the text that belongs to the
            model that ktcore ships, for that model.
        overwrite: replace `out` if it exists, when all is done.
        resume: go on from what an interrupted conversion with the same arguments has left.
        progress: called with what is done, how much of it, of how much.
        say: told what is worth knowing, a line at a time.

    Returns:
        The report (docs/convert.md), which `out` holds as conversion.json, or has beside it.

    Raises:
        CheckpointError: the model, or the importance matrix, cannot be read.
        ConversionError: it cannot be done; `out` is as it was.
        ValueError: an argument is none of those.
    """
    target = get_target(to)
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size: expected 32, 64 or 128, got {group_size}")
    if imatrix is not None and calibrate is not None:
        raise ValueError("imatrix: either a file or a text to calibrate with, not both")
    options = Options(group_size, experts_only, pure)
    job = _Job(
        open_source(EMBEDDED if model is None else Path(model)),
        target,
        Path(out),
        options,
        progress or (lambda what, done, total: None),
        say or (lambda line: None),
    )
    job.check_out(overwrite)
    text = _text(perplexity_text, "perplexity_text")
    if text is None and measure_perplexity and job.source.path.resolve() == EMBEDDED.resolve():
        text = (EMBEDDED / "heldout.txt").read_text("utf-8")
    calibration = _text(calibrate, "calibrate")
    with _full_disk(job.partial):
        return job.run(
            overwrite=overwrite,
            resume=resume,
            text=text,
            imatrix=None if imatrix is None else Path(imatrix),
            calibration=calibration,
            calibration_name="" if calibrate is None else Path(calibrate).name,
            save_imatrix=None if save_imatrix is None else Path(save_imatrix),
        )


def _text(path: str | Path | None, what: str) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ConversionError(f"{what}: {path} cannot be read: {error}") from error


@contextlib.contextmanager
def _full_disk(partial: Path) -> Iterator[None]:
    """Errors of writing as ConversionErrors that say what is left."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        more = "free some space, then run the same command again: it goes on from there"
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            more = "what is done is kept; the same command goes on from there"
        raise ConversionError(f"{error.filename or partial}: {why}; {more}") from error


class _Job:
    """One conversion."""

    def __init__(
        self,
        source: Source,
        target: Target,
        out: Path,
        options: Options,
        progress: Progress,
        say: Callable[[str], None],
    ):
        self.source, self.target, self.out, self.options = source, target, out, options
        self.progress, self.say = progress, say
        self.partial = out.with_name(out.name + ".partial")
        self.weights = read_weights(source)
        self.notes: list[str] = []

    def check_out(self, overwrite: bool) -> None:
        """Raises ConversionError if `out` must not be made there."""
        out = self.out.resolve()
        if not self.out.name or self.out.name in (".", ".."):
            raise ConversionError(f"{self.out}: expected the name of a new file or folder")
        if not out.parent.is_dir():
            raise ConversionError(f"{self.out.parent}: no such folder to put {self.out.name} into")
        for file in (self.source.path, *source_files(self.source)):
            path = file.resolve()
            if path == out or out in path.parents or path in out.parents:
                raise ConversionError(
                    f"{self.out}: is the model itself, within it or around it; choose another place"
                )
        if not os.path.lexists(self.out):
            return
        if not overwrite:
            raise ConversionError(f"{self.out}: exists already; --overwrite would replace it")
        if self.target.file and not self.out.is_file():
            raise ConversionError(f"{self.out}: is not a file, and is not replaced by one")
        if not self.target.file and not (self.out / "config.json").is_file():
            raise ConversionError(
                f"{self.out}: is not the folder of a model (it has no config.json), and is not "
                "replaced by one"
            )

    # --------------------------------------------------------------------------------- planning

    def plan(self, imatrix: dict[str, Any]) -> tuple[list[_Stage], Layout]:
        """What is done in which steps, and what files come of it."""
        config = self.source.config
        layers = config.num_hidden_layers
        if self.target.name == "int4":
            self._fit_groups()
        self.formats = {
            w.key: format_of(self.target, w, layers, config.tie_word_embeddings, self.options)
            for w in self.weights
        }
        family = families()[self.source.model_type]
        if self.target.file:
            keys, kinds, notes = metadata.gguf_metadata(self.source, self.target, imatrix)
            assert family.gguf is not None
            self.tensors: GgufTensors | FolderTensors = GgufTensors(family.gguf.names)
            layout = gguf_layout(self.out.name, keys, kinds, self._outs(self.weights))
        else:
            self.tensors = folder = FolderTensors(family.names)
            plain = [w for w in self.weights if isinstance(self.formats[w.key], Plain)]
            ignored = [w for w in plain if len(w.shape) > 1 and w.role != "embedding"]
            settings = quantization_config(
                self.target,
                self.options.group_size,
                [name for w in ignored for name in folder.modules(w)],
            )
            layout = folder_layout(self._outs(self.weights))
            files, notes = metadata.folder_files(self.source, self.target, settings)
            layout.extra |= files
        self.notes += notes
        self._note_fallbacks()
        stages: dict[str, _Stage] = {}
        last = max((i for i, w in enumerate(self.weights) if w.layer is not None), default=-1)
        for i, weight in enumerate(self.weights):
            name = "embedding" if i < last else "head"
            if weight.layer is not None:
                name = f"layer {weight.layer}"
            stages.setdefault(name, _Stage(name, [])).weights.append(weight)
        return list(stages.values()), layout

    def _outs(self, weights: list[Weight]) -> list[Out]:
        return [out for w in weights for out in self.tensors.tensors(w, self.formats[w.key])]

    def _fit_groups(self) -> None:
        asked = self.options.group_size
        size = fitting_group_size(self.weights, self.options)
        if size != asked:
            self.notes.append(f"groups of {size}: those of {asked} do not divide all rows")
            self.options = dataclasses.replace(self.options, group_size=size)

    def _note_fallbacks(self) -> None:
        """Say what is stored otherwise than was asked for because its rows are too short."""
        found: dict[tuple[int, str, str], list[str]] = {}
        for weight in self.weights:
            format, columns = self.formats[weight.key], weight.shape[-1]
            usual = self.target.format(
                dataclasses.replace(weight, shape=(*weight.shape[:-1], ROOMY)),
                self.source.config.num_hidden_layers,
                self.options,
            )
            if quantised(weight, self.options) and format is not usual:
                found.setdefault((columns, usual.name, format.name), []).append(weight.role)
        for (columns, usual, format), roles in found.items():
            self.notes.append(
                f"{', '.join(dict.fromkeys(roles))}: stored as {format}, as rows of {columns} are "
                f"not whole groups of {usual}"
            )

    def identity(self, layout: Layout, *more: object) -> str:
        """What makes two conversions the same, as one number."""
        parts: list[object] = [ktcore.__version__, self.target.name, asdict(self.options), *more]
        for path in (self.source.path, *source_files(self.source)):
            status = path.stat()
            parts.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
        parts += [hashlib.sha256(file.header).hexdigest() for file in layout.files]
        parts += [[n, hashlib.sha256(data).hexdigest()] for n, data in layout.extra.items()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    # ---------------------------------------------------------------------------------- running

    def run(
        self,
        *,
        overwrite: bool,
        resume: bool,
        text: str | None,
        imatrix: Path | None,
        calibration: str | None,
        calibration_name: str,
        save_imatrix: Path | None,
    ) -> dict[str, Any]:
        importance: Importance | None = None
        about: dict[str, Any] = {}
        if imatrix is not None:
            names = families()[self.source.model_type].gguf
            importance, dataset = read_imatrix(imatrix, *([names.names] if names else []))
            about = {"file": imatrix.name, "dataset": dataset}
        elif calibration is not None:
            about = {"file": IMATRIX, "dataset": calibration_name}
        stages, layout = self.plan(about)
        given = (None if imatrix is None else _digest(imatrix), calibration)
        journal = Journal(self.partial / JOURNAL, self.identity(layout, *given))

        self.partial.mkdir(exist_ok=True)
        with only_one(self.partial / LOCK, self.partial):
            found = journal.read()
            going_on = resume and found
            if not going_on:
                journal.done.clear()
                self._start_afresh(found)
            writer = Writer(self.partial, layout)
            made = self.partial / self.out.name if self.target.file else self.partial
            if going_on and writer.sound():
                journal.begin()
            else:
                self._check_space(layout.nbytes)
                journal.done = {k: v for k, v in journal.done.items() if not k.startswith(STAGE)}
                journal.begin()  # first: a folder with a journal is known for one's own
                writer.create()
                metadata.check_tokenizer(self.source, made)
            try:
                self._drop_damaged(journal, writer, stages)
                before = self._before(journal, text, calibration, calibration_name)
                if calibration is not None:
                    importance, _ = read_imatrix(self.partial / IMATRIX)
                    if save_imatrix is not None:
                        shutil.copyfile(self.partial / IMATRIX, save_imatrix)
                self._write(journal, writer, stages, importance)
            finally:
                writer.close()
            if (
                self.target.file
                and "tokenizer.ggml.tokens" in open_source(made).checkpoint.metadata
            ):
                metadata.check_tokenizer(self.source, made)
            after = None if before is None else self._perplexity(journal, "after", made, text)
            report = self._report(journal, stages, layout, about, before, after)
        self._put_in_place(overwrite, report)
        return report

    def _start_afresh(self, found: bool) -> None:
        """Empty the folder of what another conversion, or another program, has left."""
        left = [path for path in self.partial.iterdir() if path.name != LOCK]
        if not left:
            return
        if not (self.partial / JOURNAL).is_file():
            raise ConversionError(
                f"{self.partial}: holds files that no conversion has left; move them away"
            )
        if not found:
            self.say(
                f"{self.partial}: was left by a conversion of another model, or with other "
                "options; starting afresh"
            )
        for path in sorted(left, key=lambda path: path.name == JOURNAL):  # the journal last
            path.unlink()

    def _check_space(self, nbytes: int) -> None:
        free = shutil.disk_usage(self.partial).free
        if nbytes + SPARE_BYTES > free:
            raise ConversionError(
                f"{self.out}: takes {nbytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free "
                "there"
            )

    def _drop_damaged(self, journal: Journal, writer: Writer, stages: list[_Stage]) -> None:
        """Do again what the disk does not hold as it was written."""
        done = [s for s in stages if STAGE + s.name in journal.done]
        for stage in done:
            self.progress("checking what is done", done.index(stage), len(done))
            entry = journal.done[STAGE + stage.name]
            if writer.checksum(self._outs(stage.weights)) != entry["checksum"]:
                del journal.done[STAGE + stage.name]
                self.say(f"{self.partial}: {stage.name} is damaged, and is made again")
        if done:
            journal.begin()
            kept = sum(STAGE + s.name in journal.done for s in stages)
            self.say(f"{self.partial}: going on, {kept} of {len(stages)} steps are done")

    def _before(
        self, journal: Journal, text: str | None, calibration: str | None, calibration_name: str
    ) -> float | None:
        """What needs the model itself: its perplexity, and what its weights are given."""
        path = self.partial / IMATRIX
        if calibration is not None and "imatrix" not in journal.done:
            with self._loaded(self.source.path, release=False) as model:
                try:
                    found, windows = measure(
                        model, calibration, progress=lambda i, n: self.progress("calibrating", i, n)
                    )
                except ValueError as error:
                    raise ConversionError(f"calibrate: {error}") from None
            write_imatrix(path, found, calibration_name, windows)
            journal.add("imatrix", {"windows": windows})
        return None if text is None else self._perplexity(journal, "before", self.source.path, text)

    def _perplexity(self, journal: Journal, when: str, path: Path, text: str | None) -> float:
        assert text is not None
        step = f"perplexity {when} {hashlib.sha256(text.encode()).hexdigest()}"
        if step not in journal.done:
            self.progress(f"perplexity {when}", 0, 1)
            with self._loaded(path) as model:
                try:
                    journal.add(step, perplexity(model, text))
                except ValueError as error:
                    raise ConversionError(f"perplexity_text: {error}") from None
            self.progress(f"perplexity {when}", 1, 1)
        return journal.done[step]

    @contextlib.contextmanager
    def _loaded(self, path: Path, release: bool | None = None) -> Iterator[Any]:
        def show(done: int, total: int) -> None:
            self.progress("loading", done, total)

        model = load_model(path, release=release, progress=show)
        try:
            yield model
        finally:
            del model
            gc.collect()

    def _write(
        self,
        journal: Journal,
        writer: Writer,
        stages: list[_Stage],
        importance: Importance | None,
    ) -> None:
        total = sum(math.prod(w.shape) for w in self.weights)
        done = 0
        for stage in stages:
            step = STAGE + stage.name
            size = sum(math.prod(w.shape) for w in stage.weights)
            if step not in journal.done:
                rows = []
                for weight in stage.weights:
                    self.progress(f"converting {stage.name}", done, total)
                    rows.append(self._convert(weight, writer, importance))
                    done += math.prod(weight.shape)
                checksum = writer.finish(self._outs(stage.weights))
                journal.add(step, {"checksum": checksum, "tensors": rows})
            else:
                done += size
        self.progress("converting", total, total)

    def _convert(
        self, weight: Weight, writer: Writer, importance: Importance | None
    ) -> dict[str, Any]:
        """Read, quantise and write one weight; its line of the report."""
        format = self.formats[weight.key]
        columns = None if importance is None else importance.of(weight)
        error = Error()
        step = max(1, PIECE // max(1, math.prod(weight.shape[1:])))
        for begin in range(0, weight.shape[0], step):
            end = min(begin + step, weight.shape[0])
            stored = weight.read(begin, end)
            mine = columns[begin:end] if columns is not None and weight.experts else columns
            values = floats(stored).to(torch.float32)
            if not bool(values.isfinite().all()):
                raise ConversionError(
                    f"{self.source.path}: {weight.key} holds a NaN or an infinity, which cannot be "
                    "converted"
                )
            parts = quantize(values, format, mine, error, taken_over(stored, format))
            writer.write(self.tensors.pieces(weight, format, parts, begin))
        if not math.isfinite(error.relative):
            raise ConversionError(
                f"{self.source.path}: {weight.key} is beyond what {format.name} can express"
            )
        row = {
            "name": weight.key,
            "role": weight.role,
            "layer": weight.layer,
            "shape": list(weight.shape),
            "from": "+".join(weight.formats),
            "to": format.name,
            "bits_per_weight": 8 * _nbytes(format, weight) / math.prod(weight.shape),
            "relative_error": error.relative,
        }
        if weight.experts:
            row["worst_expert_error"] = error.worst
        if columns is not None:
            row["weighted_error"] = error.weighted
        return row

    # ---------------------------------------------------------------------------------- the end

    def _report(
        self,
        journal: Journal,
        stages: list[_Stage],
        layout: Layout,
        imatrix: dict[str, Any],
        before: float | None,
        after: float | None,
    ) -> dict[str, Any]:
        rows = [row for s in stages for row in journal.done[STAGE + s.name]["tensors"]]
        weights = sum(math.prod(w.shape) for w in self.weights)
        source_bytes = sum(w.nbytes for w in self.weights)
        made = sum(_nbytes(self.formats[w.key], w) for w in self.weights)
        unused = left_over(self.source)
        if unused:
            names = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
            self.notes.append(
                f"{len(unused)} tensors that the model does not use left out: {names}"
            )
        return {
            "schema_version": 1,
            "kind": "conversion",
            "ktcore": ktcore.__version__,
            "model": {"path": str(self.source.path), "model_type": self.source.model_type},
            "to": self.target.name,
            "options": asdict(self.options),
            "imatrix": imatrix or None,
            "out": str(self.out),
            "weights": weights,
            "bytes": {"before": source_bytes, "after": made},
            "bits_per_weight": {
                "before": 8 * source_bytes / weights,
                "after": 8 * made / weights,
            },
            "perplexity": None if before is None else {"before": before, "after": after},
            "notes": self.notes,
            "tensors": rows,
        }

    def _put_in_place(self, overwrite: bool, report: dict[str, Any]) -> None:
        """Make the partial folder, or the file in it, the target."""
        text = json.dumps(report, indent=2, allow_nan=False) + "\n"
        if os.path.lexists(self.out) and not overwrite:  # since the beginning
            raise ConversionError(
                f"{self.out}: has come into being meanwhile; the result is in {self.partial}"
            )
        if self.target.file:
            beside = self.out.with_name(f"{self.out.stem}.{REPORT}")
            (self.partial / REPORT).write_text(text, "utf-8")
            os.replace(self.partial / self.out.name, self.out)
            os.replace(self.partial / REPORT, beside)
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        (self.partial / REPORT).write_text(text, "utf-8")
        old = None
        if self.out.exists():
            old = self.out.with_name(self.out.name + ".replaced")
            os.rename(self.out, old)
        try:
            os.rename(self.partial, self.out)
        except OSError:
            if old is not None:
                os.rename(old, self.out)
            raise
        for name in (JOURNAL, LOCK, IMATRIX):
            (self.out / name).unlink(missing_ok=True)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def _nbytes(format: Format, weight: Weight) -> int:
    return format.nbytes(weight.shape)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except AttributeError:  # Python 3.10
        return hashlib.sha256(path.read_bytes()).hexdigest()
