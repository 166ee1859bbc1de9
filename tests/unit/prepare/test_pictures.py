"""The page of pictures: what it shows, what it says of unusual cases, and that it changes nothing else."""

from __future__ import annotations

import io
import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mpscl_ray.data.volumes.preprocess import prepare_volume
from mpscl_ray.data.volumes.recipe import Recipe
from mpscl_ray.prepare.check_command import main as check
from mpscl_ray.prepare.command import main as prepare
from mpscl_ray.prepare.pictures.album import Album, PicturedCase
from mpscl_ray.prepare.pictures.case import CasePicture, picture
from mpscl_ray.prepare.pictures.outliers import oddness
from mpscl_ray.prepare.pictures.page import page
from mpscl_ray.prepare.pictures.tiles import BOX, HATCH, Plane, Tile, draw
from mpscl_ray.runs.palette import colour
from mpscl_ray.runs.structures import NOT_ANNOTATED
from tests.json_command import json_of
from tests.raw_volumes import made, mmwhs, volume, write
from tests.tiny import make_dataset

CLASSES = ("background", "wall")
SHAPE = (20, 24, 18)


def pixels(tile: Tile) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(tile.png)).convert("RGB"))


def shown(html: str) -> list[str]:
    """Case ids in the order of their pictures."""
    return re.findall(r"<h3>(.*?)</h3>", html)


def reasons(html: str) -> list[str]:
    """What the page says of its first case."""
    first = html[html.index("<article") :].split("</article>")[0]
    return re.findall(r"<li>(.*?)</li>", first.split("</ul>")[0]) if 'class="why"' in first else []


# ---------------------------------------------------------------------------------------------------------- tiles


def test_colours_of_contours_of_what_is_not_annotated_and_of_the_crop() -> None:
    label = np.zeros((64, 64), dtype=np.uint8)
    label[8:24, 8:24] = 1
    label[8:24, 40:56] = 9  # the colours of classes repeat
    label[40:56, 8:24] = NOT_ANNOTATED
    plane = Plane("", np.full((64, 64), 0.5, dtype=np.float32), label, (1.0, 1.0), ("", "", "", ""))
    drawn = pixels(draw(plane, 32))  # a pixel of the plane is 2 x 2 of the tile
    grey = tuple(drawn[0, 0])
    assert len(set(grey)) == 1
    assert [tuple(drawn[row, 20]) for row in (15, 16, 17, 46, 47, 48)] == [grey, colour(1), grey, grey, colour(1), grey]
    assert tuple(drawn[16, 85]) == colour(9) == colour(2)
    hatched = drawn[82:110, 18:46].reshape(-1, 3)
    assert {tuple(pixel) for pixel in hatched} == {grey, HATCH}
    assert 0.2 < np.mean(hatched == HATCH) < 0.3
    boxed = pixels(draw(replace(plane, label=None, box=(-5.0, 32.0, 16.0, 48.0)), 32))
    rows, columns = np.nonzero((boxed == BOX).all(axis=-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 64, 32, 96)


def test_proportions_are_those_in_mm() -> None:
    tile = draw(Plane("", np.zeros((10, 40), dtype=np.float32), None, (2.0, 1.0), ("", "", "", "")), 32)
    assert (tile.height, tile.width) == (64, 128)


# -------------------------------------------------------------------------------------------------- one case


def pictured(image: NDArray[Any], affine: NDArray[Any], label: NDArray[Any], plane: str = "coronal") -> CasePicture:
    recipe = Recipe(slice_axis=plane, crop=(16, 16), centre="labels")
    done = prepare_volume(image, affine, label, recipe)
    return picture(done.image, done.label, done.geometry, done.geometry.spacing_mm, original=image)


@pytest.mark.parametrize("plane", ["coronal", "axial", "sagittal"])
def test_all_orientations_of_an_array_give_the_same_picture(plane: str) -> None:
    random = np.random.default_rng(0)
    image = random.normal(size=SHAPE).astype(np.float32)
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[6:11, 9:14, 5:10] = 1
    affine = np.diag([1.5, 1.5, 2.0, 1.0])
    expected = pictured(image, affine, label, plane)
    letters = set()
    for order, senses in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        turn = np.array([[axis, sense] for axis, sense in zip(order, senses, strict=True)])
        sources = nib.Nifti1Image(image, affine), nib.Nifti1Image(label, affine)
        turned, turned_label = (source.as_reoriented(turn) for source in sources)
        voxels = np.asfortranarray(turned.dataobj)
        found = pictured(voxels, turned.affine, np.asarray(turned_label.dataobj), plane)
        letters.add(found.letters)
        assert found.tiles == expected.tiles, found.letters
        assert (found.extent, found.voxel_mm) == (expected.extent, expected.voxel_mm)
    assert len(letters) == 48


@pytest.mark.parametrize(
    ("plane", "edges"),
    [
        ("coronal", ["RLSI", "RLAP", "APSI"]),
        ("axial", ["RLAP", "RLSI", "SIAP"]),
        ("sagittal", ["APSI", "APRL", "RLSI"]),
    ],
)
def test_a_spot_at_the_left_the_front_and_the_top_is_where_the_letters_say(plane: str, edges: list[str]) -> None:
    image = np.random.default_rng(0).normal(size=(32, 32, 32)).astype(np.float32)
    image[4:12, 20:28, 20:28] += 100  # x, y, z grow to the right, the front and the top
    label = np.zeros(image.shape, dtype=np.uint8)
    label[4:12, 20:28, 20:28] = 1
    done = prepare_volume(image, np.eye(4), label, Recipe(slice_axis=plane, crop=None))
    tiles = picture(done.image, done.label, done.geometry, (1.0, 1.0, 1.0), original=image).tiles
    assert len(tiles) == 6
    seen = [tiles[1], tiles[3], tiles[4]]
    assert ["".join(tile.edges) for tile in seen] == edges
    assert tiles[5].edges == tiles[1].edges
    for tile in seen:
        rows, columns = np.nonzero((pixels(tile) == colour(1)).all(axis=-1))
        centre = float(rows.mean()) / tile.height, float(columns.mean()) / tile.width
        left, _, top, _ = tile.edges
        assert abs(centre[1] - (0.25 if left in "LAS" else 0.75)) < 0.02, tile.title
        assert abs(centre[0] - (0.25 if top in "LAS" else 0.75)) < 0.02, tile.title


def test_a_noisy_case_stays_small() -> None:
    image = np.random.default_rng(0).uniform(size=(128, 128, 128)).astype(np.float32)
    done = prepare_volume(image, np.eye(4), None, Recipe(crop=(128, 128)))
    tiles = picture(done.image, None, done.geometry, (1.0, 1.0, 1.0), original=image).tiles
    assert sum(len(tile.png) for tile in tiles) * 4 / 3 < 58_000


def test_slices_without_geometry_have_no_letters_and_no_mm() -> None:
    image = np.random.default_rng(0).normal(size=(1, 16, 16)).astype(np.float32)
    found = picture(image, None, None, None)
    assert [tile.edges for tile in found.tiles] == [("", "", "", "")]
    assert (found.letters, found.voxel_mm, found.extent) == ("", None, (1.0, 16.0, 16.0))


# ---------------------------------------------------------------------------------------------------- outliers


def doubled(image: NDArray[Any], label: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    return image * 2, label, np.diag([1.5, 1.5, 2.0, 1.0])


def tenfold(image: NDArray[Any], label: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    return image, label, np.diag([15.0, 15.0, 20.0, 1.0])


def mistaken(image: NDArray[Any], label: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    return image, label, np.diag([1.5, 1.5, 2.0, 1.0])[[1, 2, 0, 3]]


def incomplete(image: NDArray[Any], label: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    return image, np.where(label == 820, 0, label), np.diag([1.5, 1.5, 2.0, 1.0])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (doubled, r"intensities from \d+ to \d+, usually \d+ to \d+"),
        (tenfold, r"voxels of 15 x 20 x 15 mm \(slice, row, column\), usually 1.5 x 2 x 1.5 mm"),
        (mistaken, r"turned or mirrored it would fit better .*: check the orientation in its header"),
        (incomplete, "no AA"),
    ],
)
def test_the_odd_case_is_first_and_explained(tmp_path: Path, spoil: Any, said: str) -> None:
    folder = mmwhs(tmp_path / "in", "mr", range(1001, 1009))
    image, label, affine = spoil(*volume(1005))
    write(folder / "mr_train_1005_image.nii.gz", image, affine)
    write(folder / "mr_train_1005_label.nii.gz", label, affine)
    dataset, _ = made(folder, "mr")
    html = (dataset / "pictures.html").read_text(encoding="utf-8")
    assert shown(html)[0] == "mr_1005"
    assert re.search(said, " ".join(reasons(html))), reasons(html)
    assert html.count('class="unusual"') == 1


def test_cases_that_are_alike_are_not_odd(tmp_path: Path) -> None:
    dataset, _ = made(mmwhs(tmp_path / "in", "mr", range(1001, 1009)), "mr")
    html = (dataset / "pictures.html").read_text(encoding="utf-8")
    assert "No case is unlike the others." in html
    assert reasons(html) == []


def some(number: int, **changes: Any) -> PicturedCase:
    image = np.random.default_rng(number).normal(size=(4, 16, 16)).astype(np.float32)
    done = picture(image, None, None, None)
    case = PicturedCase(f"case{number:03}", f"p{number}", "train", (4, 16, 16), None, None, (), done)
    return replace(case, **changes)


def test_rare_notices_count_and_common_ones_do_not() -> None:
    cases = [some(number, notices=("3 voxels are odd",)) for number in range(8)]
    cases[5] = replace(cases[5], notices=("4 voxels are odd", "the header is strange"))
    assert [one.score for one in oddness(cases, ())] == [0, 0, 0, 0, 0, 1, 0, 0]


def test_few_cases_are_not_compared() -> None:
    cases = [some(0), some(1), some(2, picture=replace(some(2).picture, quantiles=np.arange(101, dtype=np.float32)))]
    assert [one.score for one in oddness(cases, ())] == [0, 0, 0]
    assert [one.score > 0 for one in oddness([*cases, some(3), some(4)], ())] == [False, False, True, False, False]


def test_of_many_cases_the_odd_ones_and_a_sample_are_shown() -> None:
    usual = some(0)
    cases = [replace(usual, id=f"case{number:03}") for number in range(210)]
    cases[150] = some(150, picture=replace(usual.picture, quantiles=usual.picture.quantiles * 9))
    html = page([Album("mr", (), cases)], "Pictures")
    assert "200 of 210 cases are shown" in html
    assert shown(html)[0] == "case150"
    assert len(set(shown(html))) == 200
    assert {"case000", "case209"} <= set(shown(html))


# ------------------------------------------------------------------------------------------------------ commands


def test_prepare_writes_the_page_and_nothing_else_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = mmwhs(tmp_path / "in")
    words = [str(folder), "--layout", "mmwhs", "--split", "0.5,0.25,0.25", "--crop", "16,16", "--workers", "0"]
    assert prepare([*words, "--out", str(tmp_path / "out")]) == 0
    path = tmp_path / "out" / "ct" / "pictures.html"
    assert f"  pictures: {path}\n" in capsys.readouterr().out
    html = path.read_text(encoding="utf-8")
    assert len(shown(html)) == 6
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\(", re.sub(r"base64,[\w+/=]+", "", html))
    assert {source[:22] for source in re.findall(r'src="([^"]*)"', html)} == {"data:image/png;base64,"}
    assert html.count("<img ") == 6 * 6
    assert check([str(path.parent), "--pictures", str(tmp_path / "look.html")]) == 0
    again = (tmp_path / "look.html").read_text(encoding="utf-8")
    assert sorted(shown(again)) == sorted(shown(html))
    assert again.count("<img ") == 6 * 5  # the image is not read again
    assert html.count("stored as RAS") == again.count("stored as RAS") == 6
    first = {file.relative_to(tmp_path / "out"): file.read_bytes() for file in (tmp_path / "out").rglob("*.*")}
    assert prepare([*words, "--out", str(tmp_path / "out"), "--no-pictures", "--overwrite"]) == 0
    assert "pictures.html" not in capsys.readouterr().out
    second = {file.relative_to(tmp_path / "out"): file.read_bytes() for file in (tmp_path / "out").rglob("*.*")}
    del first[path.relative_to(tmp_path / "out")]
    assert second == first


def test_check_draws_images_and_escapes_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    for number in range(3):
        write(folder / f"<i>{number}&.nii.gz", volume(number)[0])
    (folder / "<b>bad.nii.gz").write_bytes(b"nothing")
    file = tmp_path / "look.html"
    words = ["--layout", "folder", "--modality", "mr", "--image-pattern", "{case}.nii.gz", "--unlabelled"]
    assert check([str(folder), *words, "--workers", "0", "--pictures", str(file)]) == 3
    assert f"pictures: {file}\n" in capsys.readouterr().out
    html = file.read_text(encoding="utf-8")
    assert shown(html) == [f"&lt;i&gt;{number}&amp;" for number in range(3)]
    assert "<i>0" not in html
    assert "<b>bad" not in html
    assert "&lt;b&gt;bad.nii.gz" in html
    assert html.count("<img ") == 3 * 6


def test_check_draws_datasets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_dataset(tmp_path / "mr", "mr")
    make_dataset(tmp_path / "ct", "ct", labelled=())
    file = tmp_path / "look.html"
    found = json_of(check, tmp_path, "--pictures", file)
    assert set(found["data"][0]) == {"folder", "about", "findings"}
    assert found["pictures"] == str(file)
    assert capsys.readouterr().err.endswith(f"pictures: {file}\n")
    html = file.read_text(encoding="utf-8")
    assert sorted(shown(html)) == sorted(
        f"{modality}_{split}_{number}"
        for modality in ("mr", "ct")
        for split, count in (("train", 3), ("val", 2), ("test", 2))
        for number in range(count)
    )
    assert html.count("<img ") == 14 * 5  # no image, so no whole slice
    assert "ventricle" in html
