"""From the scans of two hospitals to scores, label maps for 3D Slicer, a model file and a report, in ten steps.

    python docs/examples/ten_steps.py FOLDER [key=value ...]

Hospital A has MR with label maps, hospital B CT; labels of B are needed for validation and scores only. FOLDER/A and
FOLDER/B hold their scans; where these are missing, phantom hearts are written. The other words are settings of
python -m mpscl_ray.train.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from mpscl_ray import (
    check_dataset,
    export_model,
    load_config,
    load_segmenter,
    prepare_dataset,
    score,
    train_segmenter,
)
from mpscl_ray.data.phantom.files import make_phantom

PREPARED = {
    "labels": "205=MYO,420=LAC,500=LVC,820=AA",
    "ignore_labels": "550,600,850",
    "image_pattern": "{case}_image.nii.gz",
    "label_pattern": "{case}_label.nii.gz",
    "spacing_mm": (2.4, 2.4, 2.4),
    "crop": (64, 64),
    "workers": 0,
}
"""How images, labels and slices are read: options of python -m mpscl_ray.prepare --help. 550, 600 and 850 are the right
atrium, the right ventricle and the pulmonary artery."""


def main(folder: Path, settings: list[str]) -> None:
    # 1. Scans: images and label maps of each hospital in a folder.
    if not (folder / "A").exists():
        make_phantom(folder / "A", cases_mr=8, cases_ct=0, seed=1)
        make_phantom(folder / "B", cases_mr=0, cases_ct=8, seed=1)

    # 2. Is anything wrong with them? Nothing is written.
    for hospital, modality in (("A", "mr"), ("B", "ct")):
        for checked in check_dataset(folder / hospital, "folder", modality=modality, **PREPARED):
            print(checked.about, [finding.message for finding in checked.problems])

    # 3. The labelled hospital becomes a dataset, split by patient.
    split = "0.5,0.25,0.25"
    source = prepare_dataset(folder / "A", folder / "data", "folder", modality="mr", split=split, **PREPARED)

    # 4. So does the other one. Its patients of the training split get no labels.
    options = {"modality": "ct", "split": split, "unlabelled": ("train",), **PREPARED}
    target = prepare_dataset(folder / "B", folder / "data", "folder", **options)

    # 5. Settings: a preset and what differs from it.
    data = [f"data.source={source['mr']}", f"data.target={target['ct']}"]
    config = load_config("small/mpscl", [*data, f"run.storage={folder / 'runs'}", "run.name=a-to-b", *settings])
    print(config.schedule)

    # 6. Train, and score the end of each phase. The same call resumes a run that was interrupted.
    result = train_segmenter(config, progress=True)

    # 7. Did the adaptation help? Dice of hospital B before and after it.
    for phase, scores in result.scores.items():
        print(phase, scores["mean"]["dice"])

    # 8. Segment a new scan of hospital B; 3D Slicer opens the file with names and colours.
    segmenter = load_segmenter(result.run)
    image, label = sorted((folder / "B").glob("*"))[-2:]
    label_map = segmenter.predict_file(image, folder / "maps" / "new.seg.nrrd", label_values="raw")

    # 9. Score any label map against any other.
    for structure, row in score(label_map, label, class_names=segmenter.label_values).items():
        print(structure, row.dice, row.hd95_mm)

    # 10. One file to give away, and a page to look at: a command prints JSON about what it did.
    export_model(result.run, folder / "a-to-b.mpscl", overwrite=True)
    words = ["report", str(result.run), "--out", str(folder / "report"), "--json"]
    report = subprocess.run([sys.executable, "-m", "mpscl_ray", *words], stdout=subprocess.PIPE, check=True)
    print("open", json.loads(report.stdout)["page"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
