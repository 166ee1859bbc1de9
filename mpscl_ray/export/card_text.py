"""A model card as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpscl_ray.data import SPLITS
from mpscl_ray.evaluate.evaluation import PROTOCOLS
from mpscl_ray.evaluate.tables import markdown_table
from mpscl_ray.predict.postprocessing import Postprocessing
from mpscl_ray.runs.structures import display_order

_UNKNOWN = "not known"


def card_text(card: Mapping[str, Any]) -> str:
    """The card, from its facts (:func:`mpscl_ray.export.card.card_of`)."""
    parts = [
        f"# Model card: {card['name']}",
        f"**{card['warning']}**",
        _overview(card),
        "## Data",
        *_data(card),
        "## Scores",
        *_scores(card["scores"], card["weights"]["checkpoint"]),
        "## Choice of the weights",
        _selection(card["selection"]),
        *_postprocessing(card.get("postprocessing")),
        "## Preparation of a volume",
        "\n".join(_preparation(role, values) for role, values in card["data"].items()),
        "## Intended use",
        card["intended_use"],
        "## Licence",
        f"Weights: {card['licence']['weights'] or 'not stated; ask who made them'}. "
        f"Software: {card['licence']['software']}.",
        "## Versions",
        f"{_pairs(card['versions'])}.",
    ]
    return "\n\n".join(parts) + "\n"


def _overview(card: Mapping[str, Any]) -> str:
    weights, network = card["weights"], card["network"]
    modalities = {role: values["modality"] for role, values in card["data"].items()}
    structures = card["structures"]
    rows = [
        ["", ""],
        ["method", f"{card['method']}, from {modalities['source']} to {modalities['target']}"],
        ["structures", ", ".join(_structure(name, structures[name]) for name in display_order(list(structures)))],
        [
            "weights",
            f"{weights['checkpoint']}; phase {_said(weights['phase'])}, iteration {_said(weights['iteration'])}",
        ],
        ["network", f"{_pairs(network)}; {weights['parameters']} parameters"],
        ["slices", f"{card['slices'][0]} x {card['slices'][1]} pixels"],
    ]
    return markdown_table(rows)


def _structure(name: str, value: int | None) -> str:
    return name if value is None else f"{name} ({value} in label files)"


def _data(card: Mapping[str, Any]) -> list[str]:
    rows: list[Sequence[str]] = [
        ["dataset", "labels train", *(f"{name}: volumes (labelled), slices" for name in SPLITS)]
    ]
    for role, values in card["data"].items():
        splits = values["splits"] or {}
        cells = [
            f"{splits[name]['volumes']} ({splits[name]['labelled']}), {splits[name]['slices']}"
            if name in splits
            else _UNKNOWN
            for name in SPLITS
        ]
        rows.append([f"{role}: {values['modality']}", "yes" if values["labels_train"] else "no", *cells])
    ranges = [
        f"- {role}: {volumes['cases']} training volumes; voxels (slice, row, column) of "
        f"{' x '.join(f'{low:.3g} to {high:.3g}' for low, high in volumes['voxel_mm'])} mm"
        for role, volumes in ((role, values["training_volumes"]) for role, values in card["data"].items())
        if volumes and "voxel_mm" in volumes
    ]
    return [markdown_table(rows), *(["\n".join(ranges)] if ranges else [])]


def _scores(scores: Mapping[str, Any] | None, checkpoint: str) -> list[str]:
    if scores is None:
        return [f"These weights (`{checkpoint}`) were not scored before the export."]
    rows = [["structure", "Dice %", "ASD mm", "HD95 mm", "missed", "false alarms"]]
    for name, values in scores["structures"].items():
        cells = [_mean(values["dice"], 100.0), _mean(values["asd_mm"]), _mean(values["hd95_mm"])]
        rows.append([name, *cells, *(str(values["counts"][kind]) for kind in ("missed", "false_alarm"))])
    return [
        f"{scores['volumes']} labelled {'test' if scores['split'] == 'test' else 'validation'} volumes of "
        f"{scores['modality']} (target), mean ± sd; scored: {PROTOCOLS[scores['protocol']]}.",
        markdown_table(rows),
    ]


def _mean(statistic: Mapping[str, Any], scale: float = 1.0) -> str:
    if statistic["mean"] is None:
        return "n/a"
    return f"{scale * statistic['mean']:.1f} ± {scale * statistic['sd']:.1f}"


def _selection(selection: Mapping[str, Any]) -> str:
    def said(key: str) -> str:
        return "yes" if selection[key] else "no"

    return (
        f"Chosen by: {selection['explanation']}. Did labels of the target choose the weights? "
        f"{said('target_labels_chose_the_weights')}. Did they train them? {said('target_labels_trained_the_weights')}."
    )


def _postprocessing(chosen: Mapping[str, Any] | None) -> list[str]:
    """None in model files of earlier versions."""
    if not chosen or not chosen["rules"]:
        return []
    return [
        f"Postprocessing of label maps: {Postprocessing.from_json(chosen['rules'])}. Did labels of the target choose "
        f"it? {'yes' if chosen['target_labels_chose_it'] else 'no'}."
    ]


def _preparation(role: str, values: Mapping[str, Any]) -> str:
    steps = {name: value for name, value in values["preparation"].items() if value is not None}
    low, high = steps.pop("scaling")
    return f"- {role}, {values['modality']}: {_pairs(steps)}; z-scores from {low:.4g} to {high:.4g} become -1 to 1"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_said(value)}" for name, value in values.items())


def _said(value: Any) -> str:
    if value is None:
        return _UNKNOWN
    return " x ".join(map(_said, value)) if isinstance(value, list | tuple) else str(value)
