"""Contents of checkpoints, and whether two are the same."""

from __future__ import annotations

from typing import Any

import torch


def assert_same(found: Any, expected: Any, where: str = "state") -> None:
    """Equal in value, type, order of keys and every bit."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor), where
        assert found.dtype == expected.dtype, where
        assert found.shape == expected.shape, where
        bits = [
            tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
            for tensor in (found, expected)
        ]
        assert torch.equal(*bits), where
        return
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        assert [type(key) for key in found] == [type(key) for key in expected], where
        for key in expected:
            assert_same(found[key], expected[key], f"{where} > {key!r}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where} > {index}")
    elif isinstance(expected, float):
        assert found.hex() == expected.hex(), where
    else:
        assert found == expected, where


def small_state(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {"step": step, "weights": torch.randn(50, generator=generator), "rng": generator.get_state()}
