"""Scoring a trained segmenter on the labelled volumes of a prepared dataset.

What is scored is what predict writes: every slice of a volume is predicted, the labels are put back on the grid of its
image file, and all voxels there are counted. Two other protocols score the prepared slices, for comparison with papers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mpscl_ray.data.dataset import Case
from mpscl_ray.distributed.places import TaskPlace
from mpscl_ray.errors import ConfigError
from mpscl_ray.evaluate.case_scores import segment_and_score
from mpscl_ray.evaluate.evaluation import Evaluation, Protocol, write_evaluation
from mpscl_ray.evaluate.metrics import StructureScore
from mpscl_ray.evaluate.over_cases import CaseOptions, map_cases
from mpscl_ray.evaluate.subject import Subject, choose_protocol, load_subject
from mpscl_ray.evaluate.tables import summarise
from mpscl_ray.predict.postprocessing import PostprocessingChoice
from mpscl_ray.predict.predictor import Predictor
from mpscl_ray.runs.model_store import ModelStore, open_model
from mpscl_ray.runs.run_directory import RunDirectory
from mpscl_ray.runs.storage import S3Path, output_directory, parse_location


def evaluate_checkpoint(
    run: RunDirectory | Path | str,
    checkpoint: str = "last",
    *,
    data: Path | str | None = None,
    split: str = "test",
    out: Path | S3Path | str | None = None,
    device: str | None = None,
    workers: int | None = None,
    postprocessing: PostprocessingChoice = "chosen",
    protocol: Protocol | None = None,
    progress: bool = True,
    place: TaskPlace | None = None,
) -> Evaluation:
    """Predict every labelled volume of a split, score it, and write the tables.

    Args:
        run: folder of the run, a model file, or the URL of either.
        checkpoint: see :func:`mpscl_ray.predict.model.find_checkpoint`.
        data: prepared dataset; None for the run's target.
        split: train, val or test.
        out: folder, or URL, for the tables; None for ``RUN/results/NAME``.
        device: None takes a GPU if there is one.
        workers: volumes at a time, on Ray; 0 in this process; None decides by their number.
        postprocessing: see :meth:`mpscl_ray.predict.predictor.Predictor.postprocessing`.
        protocol: ``file``: the label maps that predict writes, on the grid of the image files. ``prepared``: the
            prepared slices, resampled and cropped, as papers do. ``released``: these as the released code does. None:
            ``file``, or ``prepared`` for a dataset without label maps on that grid, and a notice says so.
        progress: whether to show a progress line.
        place: where on the Ray that this process is connected to each volume is scored; it decides the device. At most
            ``workers`` at a time, None: as many as the cluster has room for. Run and dataset must be readable there.

    Raises:
        ConfigError: no such run, checkpoint, split or device.
        DataError: the checkpoint or the dataset is damaged, they do not fit, or no volume of the split is labelled.
        StorageError: the tables cannot be written.
    """
    home = open_model(run)
    if out is None and isinstance(home.store, ModelStore):
        raise ConfigError(
            f"{home.display_path} is a model file, which keeps no results; give a folder for them: --out DIR"
        )
    device = place.device if place else device
    # Elsewhere this process only checks the weights, before tasks start.
    subject = load_subject(home, checkpoint, data, split, "cpu" if place else device)
    protocol, notices = choose_protocol(protocol, subject)
    subject = replace(subject, notices=(*subject.notices, *notices))
    rules = subject.predictor.postprocessing(postprocessing)
    if rules.oracle:
        notice = "oracle: labels of target volumes chose the postprocessing, which is not possible without them"
        subject = replace(subject, notices=(*subject.notices, notice))
    name = _result_name(subject, postprocessing, protocol)
    location = parse_location(out or home.results / name)
    _check_writable(location)
    options = replace(CaseOptions.of(home, subject, protocol, device), postprocessing=rules)
    scores = map_cases(
        _score_case, subject, options, label="evaluating", workers=workers, progress=progress, place=place
    )
    evaluation = _evaluation(name, home.display_path, subject, options, scores)
    with output_directory(location) as written:
        write_evaluation(evaluation, written)
    if out is None:
        home.store.upload(home.results / location.name)
    return evaluation


def _check_writable(location: Path | S3Path) -> None:
    """Find out before the work whether the tables can be written."""
    if isinstance(location, S3Path):
        location.require_bucket()
    with output_directory(location):
        pass


def _result_name(subject: Subject, postprocessing: PostprocessingChoice, protocol: Protocol) -> str:
    parts = [subject.weights.name, *([] if subject.is_target else [subject.manifest.modality]), subject.split]
    if postprocessing == "largest_component":
        parts.append(postprocessing)
    elif postprocessing == "none" and subject.predictor.postprocessing("chosen"):
        parts.append("no_postprocessing")
    parts += [] if protocol == "file" else [f"{protocol}_protocol"]
    return "_".join(parts)


def _score_case(predictor: Predictor, options: CaseOptions, case: Case) -> list[StructureScore]:
    _, scores = segment_and_score(
        predictor, options.case(case), options.protocol, postprocessing=options.postprocessing
    )
    assert scores is not None, f"{case.id} was chosen because it has labels"
    return scores


def _evaluation(
    name: str, run: str, subject: Subject, options: CaseOptions, scores: dict[str, list[StructureScore]]
) -> Evaluation:
    return Evaluation(
        name=name,
        run=run,
        weights=subject.weights,
        dataset=subject.dataset,
        modality=subject.manifest.modality,
        fingerprint=subject.manifest.fingerprint,
        split=subject.split,
        postprocessing=options.postprocessing,
        protocol=options.protocol,
        classes=subject.predictor.classes,
        slices={case.id: case.slices for case in subject.cases},
        scores=scores,
        summary=summarise(scores),
        notices=subject.notices,
    )
