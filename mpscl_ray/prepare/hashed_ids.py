"""Hashes in place of the names of cases and patients, so that nothing made from a dataset names anybody.

A hash is the beginning of the HMAC-SHA-256 of a name with a secret salt. The salt is in a file that the user keeps
private, together with the name behind each hash; datasets prepared with the same file agree in their hashes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpscl_ray.errors import ConfigError
from mpscl_ray.prepare.splits import Splitting
from mpscl_ray.prepare.staged_case import Request, StagedCase
from mpscl_ray.runs import safe_json
from mpscl_ray.runs.atomic_files import write_atomically

_DIGITS = 12


class HashedIds:
    """Makes hashes, and notes what each stands for.

    Args:
        file: The private file; one with a new salt is made if there is none.

    Raises:
        ConfigError: It is something else.
        StorageError: It cannot be read or written.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        content = safe_json.read_object(file) if file.exists() else {"salt": secrets.token_hex(32), "names": {}}
        salt, names = content.get("salt"), content.get("names")
        if not isinstance(salt, str) or len(salt) < 32 or not isinstance(names, dict):
            raise ConfigError(f"--hash-ids {file}: holds no salt; give the file of an earlier prepare, or a new one")
        self._salt, self._names = salt, dict[str, Any](names)

    def of(self, name: str) -> str:
        """The hash of a name."""
        found = hmac.new(self._salt.encode(), name.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()
        self._names[found[:_DIGITS]] = name
        return found[:_DIGITS]

    def save(self) -> None:
        """Write the file, for its owner alone. Raises StorageError."""
        text = json.dumps({"salt": self._salt, "names": self._names}, indent=1)
        write_atomically(self.file, text.encode(), private=True)

    def requests(self, requests: Iterable[Request]) -> list[Request]:
        """Requests whose cases and patients have hashes for names."""
        return [
            replace(one, source=replace(one.source, id=self.of(one.source.id), patient=self.of(one.source.patient)))
            for one in requests
        ]

    def splitting(self, splitting: Splitting) -> Splitting:
        """The same splits by hashes, without what was said of files by name."""
        cases = {split: tuple(map(self.of, names)) for split, names in splitting.cases.items()}
        record = dict(splitting.record)
        if "patients" in record:
            record["patients"] = {split: list(map(self.of, names)) for split, names in record["patients"].items()}
        return Splitting(cases, record)

    def staged(self, staged: StagedCase) -> StagedCase:
        """A case whose files have hashes for names."""
        names = {kind: self.of(name) for kind, name in staged.sources.items() if not kind.endswith("sha256")}
        return replace(staged, sources={**staged.sources, **names})
