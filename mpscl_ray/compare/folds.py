"""The folds that a comparison is over: those of the source, each with the same one of the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mpscl_ray.data.dataset import Manifest, fold_folder, fold_numbers
from mpscl_ray.errors import ConfigError
from mpscl_ray.runs.storage import join_location, parse_location
from mpscl_ray.runs.wording import counted


def pairs_of(source: str, target: str, *, folds: bool) -> dict[int | None, tuple[str, str]]:
    """Fold -> its source and target; without folds None -> the two datasets.

    Raises:
        ConfigError: a dataset has no folds though they are asked for, or has some though they are not, or the two have
            other folds.
    """
    found = {dataset: fold_numbers(dataset) for dataset in (source, target)}
    for dataset, numbers in found.items():
        if numbers and not folds:
            raise ConfigError(
                f"{dataset} holds {counted(len(numbers), 'fold')}: give --folds to compare over them, or one of them, "
                f"e.g. {join_location(dataset, fold_folder(numbers[0]))}, to compare on that alone"
            )
        if folds and not numbers:
            around = parse_location(dataset).parent
            advice = f"give {around}, which holds some" if fold_numbers(around) else "prepare it with --folds K"
            raise ConfigError(f"{dataset} has no folds to compare over with --folds; {advice}, or leave --folds out")
    if not folds:
        return {None: (source, target)}
    if found[source] != found[target]:
        one, other = (f"{dataset} holds {_listed(numbers)}" for dataset, numbers in found.items())
        raise ConfigError(f"{one}, and {other}: each fold needs its pair; prepare both with the same --folds")
    pairs: dict[int | None, tuple[str, str]] = {}
    for number in found[source]:
        name = fold_folder(number)
        pairs[number] = (str(join_location(source, name)), str(join_location(target, name)))
    return pairs


def check_folds(
    pairs: Mapping[int | None, tuple[str, str]], manifests: Mapping[int | None, Sequence[Manifest]]
) -> list[str]:
    """Check that every fold is there and in its place; returns warnings.

    Raises:
        ConfigError: naming the fold that is missing or another one.
    """
    seeds = []
    for side in (0, 1):
        for number, pair in manifests.items():
            about = pair[side].splitting
            if number is not None and (about.get("fold"), about.get("folds")) != (number, len(manifests)):
                raise ConfigError(
                    f"{pairs[number][side]} is fold {about.get('fold')} of {about.get('folds')}, and "
                    f"{counted(len(manifests), 'fold')} are there; prepare the folds again, all by one command"
                )
            seeds.append(about.get("seed"))
    if None in manifests or len(set(seeds)) == 1:
        return []
    return [
        f"the folds of source and target were drawn with other seeds, {seeds[0]} and {seeds[-1]}: a patient who is in "
        "both may be trained on in one and tested on in the other; if there are some, prepare both with the same --seed"
    ]


def _listed(numbers: Sequence[int]) -> str:
    return f"{counted(len(numbers), 'fold')} ({numbers[0]} to {numbers[-1]})"
