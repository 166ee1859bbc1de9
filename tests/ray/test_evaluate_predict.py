"""What the evaluate and predict commands have in common: results in a bucket, help, exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mpscl_ray.errors import ConfigError, StorageError
from mpscl_ray.evaluate import command as evaluate
from mpscl_ray.predict import command as predict
from tests.hearts_run import oblique, write_hearts_run, write_image
from tests.s3 import serve


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hearts_run(tmp_path_factory.mktemp("both"))


def test_predictions_and_tables_in_a_bucket_are_those_on_a_disk(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [str(tmp_path / name) for name in ("a.nii.gz", "b.nii.gz")]
    for number, image in enumerate(images):
        write_image(Path(image), number, oblique())
    more = ["--probabilities", "--preview", "--workers", "0"]
    with serve(tmp_path) as server:
        there, place = server.folder("out"), server.url("out")
        for out in (str(tmp_path / "out"), place):
            assert predict.main([str(run), images[0], "--out", out, *more]) == 0
            assert predict.main([str(run), images[1], "--out", out, *more]) == 0
        here = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert {name: (there / name).read_bytes() for name in there.files()} == here
        assert f"are in {place}" in capsys.readouterr().out
        with pytest.raises(ConfigError, match=r"out.* has a_prediction.nii.gz.* already; give --resume"):
            predict.main([str(run), images[0], "--out", place])
        (there / "b_preview.png").delete()
        capsys.readouterr()
        assert predict.main([str(run), *images, "--out", place, *more, "--resume"]) == 0
        assert "1 of 2 images have their label map already" in capsys.readouterr().out
        assert {name: (there / name).read_bytes() for name in there.files()} == here
        assert predict.main([str(run), images[0], "--out", place, "--workers", "0", "--overwrite"]) == 0

        assert evaluate.main([str(run), "--out", server.url("tables"), "--workers", "0"]) == 0
        assert evaluate.main([str(run), "--workers", "0"]) == 0
        for name in ("per_volume.csv", "summary.csv", "summary.json", "summary.md"):
            tables = (server.folder("tables") / name).read_bytes()
            assert tables == (run / "results" / "last_test_prepared_protocol" / name).read_bytes()

        with pytest.raises(StorageError, match="there is no bucket nowhere"):
            predict.main([str(run), images[0], "--out", server.url("out", "nowhere")])
        with pytest.raises(
            ConfigError, match="is in a bucket, but images are read from local files; copy it to this machine"
        ):
            predict.main([str(run), server.url("images/a.nii.gz"), "--out", place])
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith("out-")], "no image stays here"


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_commands_explain_themselves_and_end_with_their_exit_code(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        {"evaluate": evaluate, "predict": predict}[command].main(["--help"])
    shown = capsys.readouterr().out
    assert "examples:" in shown
    assert "exit codes:" in shown
    arguments = [str(tmp_path), *(["image.nii.gz", "--out", str(tmp_path / "out")] if command == "predict" else [])]
    call = [sys.executable, "-m", f"mpscl_ray.{command}", *arguments]
    failed = subprocess.run(call, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr
