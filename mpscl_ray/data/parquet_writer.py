"""Writing the Parquet file of one case.

``FOLDER/<split>/<case>.parquet`` has one row for each slice: ``case`` (string), ``slice_index`` (int32), ``image``
(float32 tensor [H, W], scaled to [-1, 1]; z-scored alone in ``FOLDER/cases``, the files of folds) and, for a labelled
case, ``label`` (uint8 tensor [H, W]): class indices, and 255 (``NOT_ANNOTATED``) for voxels that nobody annotated. Any
Arrow reader can read the files. Every page carries a checksum.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mpscl_ray.data import NOT_ANNOTATED
from mpscl_ray.data.compatibility import label_statistics
from mpscl_ray.data.dataset import FORMAT_VERSION, Case, StoredFile, case_file

METADATA_KEY = b"mpscl_ray"
"""Key of our entry in the metadata of the Arrow schema: format version, case and split, as JSON."""
ROW_GROUP_SLICES = 64
"""Largest number of slices in a row group. To get a single slice, a reader reads its whole group."""
ROW_GROUP_BYTES = 2**16
"""Largest size of the images in a row group; a slice of 256 x 256 has a group to itself."""


def write_case(
    folder: Path,
    *,
    id: str,
    patient: str,
    split: str,
    image: NDArray[np.float32],
    label: NDArray[np.uint8] | None,
    classes: Sequence[str],
    content_sha256: str,
    geometry: dict[str, Any],
    spacing_mm: tuple[float, float, float] | None,
    cropped_around_labels: bool,
    sources: dict[str, str],
    notices: tuple[str, ...] = (),
    label_map: StoredFile | None = None,
) -> Case:
    """Write the Parquet file of one case, sync it to disk, and return its entry for the manifest.

    Args:
        image: (D, H, W), scaled to [-1, 1]; z-scored alone where ``split`` is ``CASES``.
        label: (D, H, W) with values below ``len(classes)``, or ``NOT_ANNOTATED``; or None.
    """
    assert image.ndim == 3, image.shape
    assert image.dtype == np.float32, image.dtype
    assert label is None or label.shape == image.shape, label.shape
    assert label is None or label.dtype == np.uint8, label.dtype
    known = None if label is None else label[label != NOT_ANNOTATED]
    assert known is None or int(known.max(initial=0)) < max(len(classes), 1), f"label value without a class in {id}"
    file = case_file(split, id)
    content = _parquet(id, split, image, label)
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return Case(
        id=id,
        patient=patient,
        split=split,
        file=file,
        slices=len(image),
        labelled=label is not None,
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=content.nbytes,
        content_sha256=content_sha256,
        geometry=geometry,
        spacing_mm=spacing_mm,
        **label_statistics(label, len(classes)),
        cropped_around_labels=cropped_around_labels,
        sources=sources,
        notices=notices,
        label_map=label_map,
    )


def _parquet(id: str, split: str, image: NDArray[np.float32], label: NDArray[np.uint8] | None) -> memoryview:
    columns: dict[str, pa.Array] = {
        "case": pa.array([id] * len(image), pa.string()),
        "slice_index": pa.array(range(len(image)), pa.int32()),
        "image": pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(image)),
    }
    if label is not None:
        columns["label"] = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(label))
    table = pa.table(columns)
    about = json.dumps({"version": FORMAT_VERSION, "case": id, "split": split})
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), METADATA_KEY: about.encode()})
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        compression="lz4",
        use_dictionary=False,
        row_group_size=max(1, min(ROW_GROUP_SLICES, ROW_GROUP_BYTES // image[0].nbytes)),
        write_statistics=False,
        write_page_checksum=True,
    )
    return buffer.getbuffer()
