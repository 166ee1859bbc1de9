"""The facts of a model card, from what a run has: no path, no name of a case."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mpscl_ray import __version__
from mpscl_ray.config import config_from_dict
from mpscl_ray.config.titles import system_of, title_of
from mpscl_ray.data import SPLITS
from mpscl_ray.data.dataset import Manifest, load_manifest
from mpscl_ray.errors import MpsclError
from mpscl_ray.evaluate.run import PHASES_JSON
from mpscl_ray.predict.model import Checkpoint, Domain, Model
from mpscl_ray.predict.postprocessing import Postprocessing
from mpscl_ray.predict.predictor import Predictor
from mpscl_ray.runs import safe_json, safe_yaml
from mpscl_ray.runs.run_directory import RunDirectory

INTENDED_USE = (
    "Research on unsupervised domain adaptation, on images of the modality and kind that it was trained on. Look at "
    "each label map: nothing here says how the model does on another scanner, protocol, age group or disease."
)
WARNING = "Research software, not a medical device: not for diagnosis, treatment or any decision about a patient."
MEASURES = ("dice", "asd_mm", "hd95_mm")
_RULES = {
    "label_free": "source validation Dice minus the entropy of target predictions, the highest of all validations",
    "oracle": "target validation Dice, the highest of all validations",
}
"""What chose ``best``, by ``run.select``; others are named as they are there."""


def card_of(home: RunDirectory, predictor: Predictor, licence: str | None) -> dict[str, Any]:
    """The card of one checkpoint of a run, as JSON values.

    Args:
        home: directory of the run.
        predictor: its segmenter, with the checkpoint.
        licence: of the weights, in words.

    Raises:
        ConfigError, DataError: the settings of the run cannot be read.
    """
    model, weights = predictor.model, predictor.weights
    assert model is not None
    assert weights is not None
    config, described = safe_yaml.load(home.read_config()), home.read_model()
    labelled = described.get("labelled", "source")
    environment = _json(home, "environment.json")
    rules = predictor.postprocessing("chosen")
    card = {
        "name": config.get("run", {}).get("name", home.name),
        "warning": WARNING,
        "intended_use": INTENDED_USE,
        "method": title_of(system_of(config)),
        "structures": {name: model.domains[labelled].raw_ids.get(name) for name in model.classes[1:]},
        "network": dict(model.network),
        "slices": list(model.size),
        "weights": {
            "checkpoint": weights.name,
            "phase": weights.phase,
            "iteration": weights.step,
            "parameters": sum(parameter.numel() for parameter in predictor.network.parameters()),
        },
        "selection": _selection(weights, labelled),
        "data": {role: _data(domain, role == labelled) for role, domain in model.domains.items()},
        "postprocessing": {**rules.described(), "target_labels_chose_it": rules.oracle},
        "scores": _scores(home, model, weights, config, rules),
        "licence": {"weights": licence, "software": "Apache-2.0"},
        "versions": {
            "exported_by": __version__,
            "trained_by": described.get("version"),
            "torch": environment.get("torch", {}).get("version"),
            "python": environment.get("python"),
        },
    }
    return dict(json.loads(json.dumps(card)))  # a list where JSON has one


def _selection(weights: Checkpoint, labelled: str) -> dict[str, Any]:
    if weights.selected_by:
        rule = _RULES.get(weights.selected_by, f"the highest value of {weights.selected_by} of all validations")
    elif weights.step is None:
        rule = "unknown: the weights are from a file, not from this training"
    else:
        rule = f"nothing, they are the weights after iteration {weights.step}"
    return {
        "rule": weights.selected_by,
        "explanation": rule,
        "target_labels_chose_the_weights": weights.oracle,
        "target_labels_trained_the_weights": labelled == "target",
    }


def _data(domain: Domain, labelled: bool) -> dict[str, Any]:
    """What is known of a dataset: counts of its splits where it is still there, ranges over its training volumes."""
    trained_on = None if domain.trained_on is None else domain.trained_on.to_json()
    return {
        "modality": domain.modality,
        "labels_train": labelled,
        "splits": _splits(domain),
        "training_volumes": trained_on,
        "preparation": {**domain.recipe.to_json(), "scaling": [domain.low, domain.high]},
    }


def _splits(domain: Domain) -> dict[str, dict[str, int]] | None:
    try:
        manifest: Manifest | None = load_manifest(domain.dataset) if domain.dataset else None
    except MpsclError:
        manifest = None
    if manifest is None or (domain.fingerprint and manifest.fingerprint != domain.fingerprint):
        return None
    splits = {name: manifest.split(name) for name in SPLITS}
    return {
        name: {
            "volumes": len(cases),
            "labelled": sum(case.labelled for case in cases),
            "slices": sum(case.slices for case in cases),
        }
        for name, cases in splits.items()
    }


# ------------------------------------------------------------------------------------------------------- scores


def _scores(
    home: RunDirectory, model: Model, weights: Checkpoint, config: Mapping[str, Any], rules: Postprocessing
) -> dict[str, Any] | None:
    """Scores of what predict gives with these weights on the target, which evaluate or train wrote; None without."""
    if weights.step is None or not weights.path.is_relative_to(home.path):
        return None
    target = model.domains["target"]
    found = []
    for file in sorted(home.results.glob("*/summary.json")):
        result = _json(home, f"results/{file.parent.name}/summary.json")
        scored = result.get("checkpoint", {})
        same = (scored.get("step"), scored.get("phase")) == (weights.step, weights.phase)
        same = same and result.get("postprocessing", {}).get("rules") == rules.to_json()
        if same and result["dataset"]["fingerprint"] == target.fingerprint:
            found.append(_scored(result, result["summary"], target.modality))
    table = _json(home, f"results/{PHASES_JSON}")
    phase = _phase_that_ended(config, weights.step)
    if phase in table.get("rows", {}) and table.get("postprocessing", {}).get(phase, {}) == rules.to_json():
        found.append(_scored(table, table["rows"][phase], target.modality))
    preferred = [(split, protocol) for protocol in ("file", "prepared") for split in ("test", "val")]
    usable = [score for score in found if (score["split"], score["protocol"]) in preferred]
    return min(usable, key=lambda score: preferred.index((score["split"], score["protocol"])), default=None)


def _scored(result: Mapping[str, Any], summary: Mapping[str, Any], modality: str) -> dict[str, Any]:
    return {
        "split": result["split"],
        "protocol": result["protocol"],
        "modality": modality,
        "volumes": summary["volumes"],
        "structures": {
            name: {measure: values[measure] for measure in MEASURES} | {"counts": values["counts"]}
            for name, values in summary["structures"].items()
        },
    }


def _phase_that_ended(config: Mapping[str, Any], step: int) -> str | None:
    """The phase whose last iteration this is, counted over all phases."""
    try:
        schedule = config_from_dict(dict(config), "in config.yaml").schedule
    except MpsclError:  # of another version
        return None
    done = 0
    for name, iterations in schedule:
        done += iterations
        if done == step:
            return name
    return None


def _json(home: RunDirectory, name: str) -> dict[str, Any]:
    """A file of the run that may be missing or damaged; {} then."""
    try:
        content = safe_json.read(home.path / name)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
