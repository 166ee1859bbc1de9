"""TFRecords without TensorFlow: checksums, framing, the Example message, and the slices of the releases."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mpscl_ray.errors import DataError
from mpscl_ray.prepare.tfrecord import crc32c, masked_crc32c, parse_example, read_records, read_slices


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while True:
        byte, value = value & 0x7F, value >> 7
        out.append(byte | (0x80 if value else 0))
        if not value:
            return bytes(out)


def message(number: int, body: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(body)) + body


def integers(*values: int, packed: bool = True) -> bytes:
    if packed:
        return message(3, message(1, b"".join(map(varint, values))))
    return message(3, b"".join(varint(1 << 3) + varint(value) for value in values))


def strings(*values: bytes) -> bytes:
    return message(1, b"".join(message(1, value) for value in values))


def floats(*values: float, packed: bool = True) -> bytes:
    if packed:
        return message(2, message(1, struct.pack(f"<{len(values)}f", *values)))
    return message(2, b"".join(varint(1 << 3 | 5) + struct.pack("<f", value) for value in values))


def example(features: list[tuple[str, bytes]]) -> bytes:
    entries = (message(1, message(1, name.encode()) + message(2, body)) for name, body in features)
    return message(1, b"".join(entries))


def frame(payload: bytes) -> bytes:
    length = struct.pack("<Q", len(payload))
    return length + struct.pack("<I", masked_crc32c(length)) + payload + struct.pack("<I", masked_crc32c(payload))


def sample(
    image: NDArray[np.float32], label: NDArray[np.float32] | None, extra: bool = True, reverse: bool = False
) -> bytes:
    features = [(f"dsize_dim{axis}", integers(size)) for axis, size in enumerate(image.shape)]
    features += [("data_vol", strings(image.astype("<f4").tobytes()))]
    if label is not None:
        features += [(f"lsize_dim{axis}", integers(size)) for axis, size in enumerate((*label.shape, 3)[:3])]
        features += [("label_vol", strings(label.astype("<f4").tobytes()))]
    if extra:
        features += [
            ("mask_vol", strings(b"\0" * 64)),
            ("mask_scale", integers(4)),
            ("bias_dim0", integers(22)),
            ("bias_dim1", integers(-15)),
            ("bias_dim2", integers(-26, packed=False)),
        ]
    return example(features[::-1] if reverse else features)


def write(path: Path, *payloads: bytes) -> Path:
    path.write_bytes(b"".join(frame(payload) for payload in payloads))
    return path


def triplet(seed: int = 0, height: int = 6, width: int = 5) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    random = np.random.default_rng(seed)
    image = random.normal(size=(height, width, 3)).astype(np.float32)
    return image, random.integers(0, 6, size=image.shape).astype(np.float32)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"\0" * 32, 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"123456789", 0xE3069283),
    ],
)
def test_crc32c_of_the_rfc(data: bytes, expected: int) -> None:
    # RFC 3720, appendix B.4; the last is the check value of the CRC catalogue.
    assert crc32c(data) == expected


@pytest.mark.parametrize("length", [1, 7, 1023, 1024, 1025, 2048, 3000, 5121])
def test_crc32c_equals_the_bitwise_definition(length: int) -> None:
    data = np.random.default_rng(length).bytes(length)
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    assert crc32c(data) == register ^ 0xFFFFFFFF


def test_masked_crc_undoes_to_the_crc() -> None:
    masked = masked_crc32c(b"123456789")
    rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
    assert (rotated >> 17 | rotated << 15) & 0xFFFFFFFF == 0xE3069283


def test_parse_example_reads_every_kind_of_list() -> None:
    features = parse_example(
        example(
            [
                ("b", strings(b"one", b"")),
                ("negative", integers(-1, -(2**63), 2**63 - 1)),
                ("unpacked", integers(-26, 3, packed=False)),
                ("f", floats(1.5, -2.0)),
                ("f2", floats(0.25, packed=False)),
                ("none", b""),
            ]
        )
    )
    assert features["b"] == [b"one", b""]
    assert features["negative"] == [-1, -(2**63), 2**63 - 1]
    assert features["unpacked"] == [-26, 3]
    np.testing.assert_array_equal(features["f"], np.float32([1.5, -2.0]))
    np.testing.assert_array_equal(features["f2"], np.float32([0.25]))
    assert features["none"] == []


def test_a_negative_integer_takes_ten_bytes() -> None:
    assert len(varint(-26)) == 10
    assert parse_example(example([("bias", integers(-26))]))["bias"] == [-26]


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_message_that_is_cut_is_refused(cut: int) -> None:
    payload = example([("name", integers(1, -2)), ("other", strings(b"xyz"))])
    with pytest.raises(ValueError, match="runs over the end"):
        parse_example(payload[:-cut])


@pytest.mark.parametrize("reverse", [False, True], ids=["in order", "in reverse"])
def test_the_middle_slice_is_the_sample(tmp_path: Path, reverse: bool) -> None:
    image, label = triplet()
    (found,) = read_slices(write(tmp_path / "a.tfrecords", sample(image, label, reverse=reverse)))
    np.testing.assert_array_equal(found.image, image[:, :, 1])
    np.testing.assert_array_equal(found.label, label[:, :, 1])


def test_a_label_of_one_slice_and_none_at_all(tmp_path: Path) -> None:
    image, label = triplet()
    path = write(tmp_path / "a.tfrecords", sample(image, label[:, :, 1]), sample(image, None, extra=False))
    one, none = read_slices(path)
    np.testing.assert_array_equal(one.label, label[:, :, 1])
    assert none.label is None


def test_records_of_one_file_come_in_order(tmp_path: Path) -> None:
    pairs = [triplet(seed) for seed in range(3)]
    found = read_slices(write(tmp_path / "a.tfrecords", *(sample(*pair) for pair in pairs)))
    assert [float(record.image[0, 0]) for record in found] == [float(image[0, 0, 1]) for image, _ in pairs]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tfrecords", sample(*triplet()), sample(*triplet(1)))
    good = path.read_bytes()
    random = np.random.default_rng(0)
    for position in random.choice(8 * len(good), size=200, replace=False):
        damaged = bytearray(good)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.tfrecords"):
            read_slices(path)


def test_garbage_with_right_checksums_is_refused_or_read_but_never_crashes(tmp_path: Path) -> None:
    payload = sample(*triplet())
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        garbage = bytearray(payload)
        # The first bytes hold most of the structure; the volumes are long and free of it.
        for position in random.integers(0, 120, size=3):
            garbage[position] = random.integers(256)
        path = write(tmp_path / "a.tfrecords", bytes(garbage))
        try:
            read_slices(path)
        except DataError as error:
            refused += "a.tfrecords" in str(error)
    assert refused > 200


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tfrecords", sample(*triplet()))
    good = path.read_bytes()
    for length in [0, 1, 11, 12, 13, 100, len(good) - 5, len(good) - 1]:
        path.write_bytes(good[:length])
        with pytest.raises(DataError, match=r"a\.tfrecords: (the file is empty|cut short|\d+ extra bytes)"):
            read_slices(path)


def test_an_absurd_length_is_refused_without_allocating(tmp_path: Path) -> None:
    length = struct.pack("<Q", 2**62)
    path = tmp_path / "a.tfrecords"
    path.write_bytes(length + struct.pack("<I", masked_crc32c(length)) + b"x" * 100)
    with pytest.raises(DataError, match="at most"):
        list(read_records(path))


def test_another_kind_of_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecords"
    path.write_bytes(b"<html><body>sign in to download</body></html>")
    with pytest.raises(DataError, match="not a TFRecord file"):
        read_slices(path)


def test_a_record_without_the_volume_tells_what_it_has(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tfrecords", example([("image/encoded", strings(b"jpeg"))]))
    with pytest.raises(DataError, match=r"record 0 .* no feature `data_vol` among \['image/encoded'\]"):
        read_slices(path)


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    image, _ = triplet()
    features = [(f"dsize_dim{axis}", integers(size)) for axis, size in enumerate((7, 7, 3))]
    path = write(tmp_path / "a.tfrecords", example([*features, ("data_vol", strings(image.tobytes()))]))
    with pytest.raises(DataError, match="90 values, its sizes say 7 x 7 x 3"):
        read_slices(path)


def test_records_of_the_release(reference_data: Path) -> None:
    counts = {}
    for path in sorted((reference_data / "mmwhs_records").glob("*/*.tfrecords")):
        (record,) = read_slices(path)
        assert record.image.shape == (256, 256)
        assert record.label is not None
        counts[path.stem] = np.bincount(record.label.astype(int).ravel(), minlength=6).tolist()
    # Counted with an independent parser.
    assert counts["sifa_training_ct_01"] == [47269, 4038, 0, 4112, 7633, 2484]
    assert counts["mr_train_slice0"] == [65536, 0, 0, 0, 0, 0]
    assert counts["ct_train_slice0"] == [56696, 2661, 4193, 1986, 0, 0]
    with np.load(reference_data / "mmwhs_records" / "mr" / "sifa_example_mr_01.npz", allow_pickle=False) as arrays:
        (record,) = read_slices(reference_data / "mmwhs_records" / "mr" / "sifa_training_mr_01.tfrecords")
        np.testing.assert_array_equal(record.image, arrays["arr_0"][:, :, 1])
        np.testing.assert_array_equal(record.label, arrays["arr_1"][:, :, 1])
